"""Damaged folders of cross-encoders and image–text models, and settings without bounds, are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from cli_helpers import assert_refused, command, write_lines
from image_helpers import draw, save_checkpoint
from tiny_model import tiny_cross_encoder

from retriever.cli.commands.encode import Encode


def replaced(**fields: object) -> Callable[[Path], None]:
    """A change of fields of a JSON file."""
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **fields})) and None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ("model.safetensors", cut),
    ("config.json", lambda file: file.write_text("[]")),
    ("config.json", lambda file: file.write_text("[" * 100_000)),
    ("config.json", replaced(hidden_size="x", text_config="x")),
    ("config.json", replaced(num_hidden_layers=2**63)),
    ("tokenizer.json", replaced(post_processor=1)),
]


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint("clip", folder / "clip")
    tiny_cross_encoder(tiny.tokenizer, folder / "cross_encoder")
    draw("red", "circle").save(folder / "red.png")
    write_lines(folder / "images.jsonl", [{"image": "red.png"}])
    write_lines(folder / "pairs.jsonl", [{"query": "a", "positive": "b"}])
    return {
        "clip": folder / "clip",
        "cross_encoder": folder / "cross_encoder",
        "images": folder / "images.jsonl",
        "pairs": folder / "pairs.jsonl",
    }


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_model_is_refused(folders: dict[str, Path], tmp_path: Path, name: str, damage: Any) -> None:
    for model, words in (
        ("clip", ("encode", "--data", folders["images"])),
        ("cross_encoder", ("score", "--kind", "cross-encoder", "--data", folders["pairs"])),
    ):
        file, before = folders[model] / name, (folders[model] / name).read_bytes()
        damage(file)
        try:
            outcome = command(*words, "--model", folders[model], "--out", tmp_path / "out.jsonl")
        finally:
            file.write_bytes(before)
        assert_refused(outcome, 1, str(folders[model]))


def test_layers_without_end_and_names_with_nul_are_refused(world: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"model": {"architecture": {"num_hidden_layers": 10**30}}}, r"num_hidden_layers: expected at most 4,096"),
        ({"data": {"cache": "a\0b"}}, r"data\.cache: expected text without NUL characters"),
    ):
        tree = yaml.safe_load(world.config.read_text())
        for section, fields in changes.items():
            for key, value in fields.items():
                inner = tree[section].get(key)
                tree[section][key] = {**inner, **value} if isinstance(inner, dict) else value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        assert_refused(command("train", tmp_path / "run.yaml", "--dry-run"), 2, message)


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_every_dtype_of_a_store_is_encoded_and_indexed(world: Any, tmp_path: Path, dtype: str) -> None:
    words = ("--model", world.model, "--data", world.beir, "--out", tmp_path / "store", "--dtype", dtype)
    assert command("encode", *words).code == 0
    outcome = command("index", "build", "--embeddings", tmp_path / "store", "--out", tmp_path / "index")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        ImportError("_agg.so: failed to map segment from shared object"),
        pyarrow.ArrowException("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"),
    ],
)
def test_a_library_for_which_there_is_no_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(Encode, "run", fail)
    assert_refused(command("encode", "--model", "m", "--data", "d", "--out", "o"), 1, "out of memory")
