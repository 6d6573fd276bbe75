"""Artifacts that only the long runs read: each is built when a reader or a command asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from artifacts import do
from cli_helpers import MEANINGS, write_lines
from image_helpers import save_checkpoint
from tiny_model import tiny_cross_encoder


def build_further(folder: Path, names: Iterable[str]) -> None:
    """Add artifacts to a folder that `artifacts.build` has written, those of FURTHER that it lacks."""
    for name in FURTHER:
        if name in names and not (folder / name).exists():
            FURTHER[name](folder, folder / name)


def _configuration(folder: Path, path: Path, **changes: object) -> None:
    """Write a copy of run.yaml with other fields, which trains into another folder."""
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    path.write_text(yaml.safe_dump({**tree, "out": str(path.with_suffix("")), **changes}, sort_keys=False))


def _stored(folder: Path, path: Path) -> None:
    """A store of codes: its name ends in their dtype."""
    words = ("--model", folder / "run/model", "--data", folder / "beir", "--out", path, "--shard-rows", 8)
    do("encode", *words, "--dtype", path.name.rpartition("_")[2])


def _cross_encoder(folder: Path, path: Path) -> None:
    tiny_cross_encoder(folder.parent / "tokenizer", path)


def _teacher(folder: Path, path: Path) -> None:
    """Scores of a teacher for pairs and their negatives."""
    do("score", "--model", folder / "run/model", "--data", folder / "mined.jsonl", "--out", path)


def _teacher_configuration(folder: Path, path: Path) -> None:
    data = {"sources": [{"path": str(folder / "scored.jsonl")}], "negatives": 1, "workers": 0}
    _configuration(folder, path, data=data, loss={"teacher": {"kind": "margin_mse"}})


def _guide_configuration(folder: Path, path: Path) -> None:
    _configuration(folder, path, loss={"guide": {"model": str(folder / "run/model")}, "limit": {"margin": 0.1}})


def _adapter(folder: Path, path: Path) -> None:
    """The run of a model folder that contains low-rank updates only."""
    config = folder / "adapter.yaml"
    lora = {"rank": 2, "save": "adapter"}
    _configuration(folder, config, out=str(path), model={"name": str(folder / "run/model"), "lora": lora})
    do("train", config)


def _clip(folder: Path, path: Path) -> None:
    save_checkpoint("clip", path)


def _fields(folder: Path, path: Path) -> None:
    """A corpus whose passages have further columns."""
    kinds = ("noun", "verb")
    rows: list[object] = [
        {
            "_id": word,
            "text": text,
            "year": 1990 + n,
            "meta": {"kind": [kinds[n % 2], word[0]], "short": len(text) < 30},
        }
        for n, (word, text) in enumerate(MEANINGS.items())
    ]
    write_lines(path, rows)


def _fields_index(folder: Path, path: Path) -> None:
    store = folder / "fields_store"
    words = ("--model", folder / "run/model", "--data", folder / "fields.jsonl", "--out", store)
    do("encode", *words, "--fields", "year", "meta.kind", "meta.short")
    do("index", "build", "--embeddings", store, "--out", path, "--factory", "Flat")


def _request(folder: Path, path: Path) -> None:
    """The body of a request to the service."""
    bodies: dict[str, object] = {
        "search.json": {"queries": ["an oak", "a river"], "k": 5, "mode": "dense", "filter": {"year": {"$gte": 1995}}},
        "embeddings.json": {"input": ["an oak"], "model": "model", "input_type": "query", "encoding_format": "base64"},
        "embed.json": {"inputs": ["an oak"], "truncate": True, "normalize": True, "prompt_name": "query"},
    }
    path.write_text(json.dumps(bodies[path.name]))


def _more_labels(folder: Path, path: Path) -> None:
    """The rows of labels.jsonl, in another order."""
    path.write_text("".join(reversed((folder / "labels.jsonl").read_text().splitlines(keepends=True))))


def _prompts(folder: Path, path: Path) -> None:
    """Prompts of each class of the folder classes."""
    path.write_text(json.dumps({name: [f"a photo of a {name}.", "an image of {c}"] for name in list(MEANINGS)[:3]}))


FURTHER: dict[str, Callable[[Path, Path], None]] = {
    "store_int8": _stored,
    "store_binary": _stored,
    "cross_encoder": _cross_encoder,
    "scored.jsonl": _teacher,
    "teacher.yaml": _teacher_configuration,
    "guide.yaml": _guide_configuration,
    "adapter": _adapter,
    "clip": _clip,
    "more_labels.jsonl": _more_labels,
    "fields.jsonl": _fields,
    "fields_index": _fields_index,
    "search.json": _request,
    "embeddings.json": _request,
    "embed.json": _request,
    "prompts.json": _prompts,
}
