"""One small artifact of every kind that is read: data files, runs, models, stores, indexes, tars, images, sets."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from children import run_command
from cli_helpers import MEANINGS, write_beir, write_config, write_lines, write_pairs
from image_helpers import draw, image_bytes, write_shards

from retriever.config.model import ModelConfig


def build(folder: Path, tiny: ModelConfig) -> None:
    """Write all artifacts into a folder."""
    folder.mkdir(parents=True)
    pairs, beir = write_pairs(folder / "pairs.jsonl"), write_beir(folder / "beir")
    options = {"dev": {"path": str(beir), "every": 3}, "steps": 6, "epochs": 1.0, "checkpoint_every": 2, "log_every": 1}
    config = write_config(folder / "run.yaml", tiny, pairs, **options)
    _tables(folder, pairs, beir)
    _images(folder)
    run, store, index = folder / "run", folder / "store", folder / "index"
    do("train", config)
    do("encode", "--model", run / "model", "--data", beir, "--out", store, "--shard-rows", 8)
    do("index", "build", "--embeddings", store, "--out", index, "--factory", "IVF2,Flat")
    do("index", "build", "--embeddings", store, "--out", folder / "index_pq", "--factory", "HNSW8,SQ8")
    more = write_lines(folder / "more.jsonl", [{"_id": f"m{i}", "text": text} for i, text in enumerate(MEANINGS)])
    do("encode", "--model", run / "model", "--data", more, "--out", folder / "more")
    do("evaluate", "beir", "--model", run / "model", "--data", beir, "--out", folder / "report", "--k", 10)
    do("mine", "--model", run / "model", "--data", beir, "--out", folder / "mined.jsonl", "--max-share", 1)
    for number in (1, 2):
        words = ("--embeddings", store, "--out", folder / f"part{number}", "--part", f"{number}/2")
        do("index", "build", *words, "--factory", "Flat")
    shutil.copytree(run / "model", folder / "plain_model")
    (folder / "plain_model" / "sha256sums.txt").unlink(missing_ok=True)


def do(*words: object) -> None:
    """Run a command, which must succeed."""
    outcome = run_command(words)
    assert outcome.kind == "ok", f"{' '.join(map(str, words))}: {outcome.detail}"


def _tables(folder: Path, pairs: Path, beir: Path) -> None:
    """Write the pairs, corpus, queries and judgements in every format."""
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    flat = [{"question": row["question"], "answer": row["answer"], "wrong": row["wrong"][0]} for row in rows]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(folder / f"pairs{suffix}", "w", newline="") as file:
            table = csv.DictWriter(file, list(flat[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(flat)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(corpus), folder / "corpus.parquet")
    for file in (pairs, beir / "corpus.jsonl", beir / "queries.jsonl", beir / "qrels" / "test.tsv"):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    lines = [f"q{i} Q0 d{(i + j) % 20} {j + 1} {1 / (j + 1):.6f} run" for i in range(20) for j in range(5)]
    (folder / "system.run").write_text("\n".join(lines) + "\n")
    (folder / "other.run").write_text("\n".join(sorted(lines, key=lambda line: line[::-1])).replace(" 1.0", " 0.01"))
    questions: list[Any] = [{"_id": f"q{i}", "text": row["question"]} for i, row in enumerate(rows)]
    write_lines(folder / "questions.jsonl", questions)
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder / "saved_dict"))
    (folder / "hub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "hub" / "train-00000-of-00001.parquet")
    (folder / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*\n---\n"
    )


def _images(folder: Path) -> None:
    """Write images in every format, tars, a table of images, and sets for zero-shot evaluation."""
    write_shards(folder / "tars", 1)
    images = folder / "images"
    images.mkdir()
    image = draw("red", "circle")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        image.save(images / f"image.{kind.lower()}", kind)
    image.convert("P").save(images / "palette.png", transparency=0)
    from PIL import Image

    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(images / "gray16.png")
    names = sorted(path.name for path in images.iterdir())
    rows: list[Any] = [{"image": f"images/{name}", "caption": f"an image, {name}"} for name in names]
    write_lines(folder / "images.jsonl", rows)
    write_lines(
        folder / "labels.jsonl", [{"image": row["image"], "label": f"class {i % 3}"} for i, row in enumerate(rows)]
    )
    (folder / "images.csv").write_text("image,caption\n" + "".join(f"{row['image']},a caption\n" for row in rows))
    shutil.copytree(folder / "tars", folder / "image_set")
    (folder / "image_set" / "dataset_type.txt").write_text("retrieval\n")
    for name in list(MEANINGS)[:3]:
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "1.png").write_bytes(image_bytes(image))
