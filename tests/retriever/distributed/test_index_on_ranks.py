"""`retriever index …` under torchrun: several processes build one index, or the command is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import command
from forks import LoadedPython, torchrun

from index.manifest import read_manifest
from index.passages import Passage
from index.store.writer import EmbeddingWriter


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    with LoadedPython() as loaded:
        yield loaded


def write_store(folder: Path, shard_rows: int) -> Path:
    """200 vectors of 16 dimensions."""
    header = {"dim": 16, "dtype": "float32", "model": {"sha256": "ab" * 32}, "source": {"file": "c.jsonl"}}
    with EmbeddingWriter(folder, **header, shard_rows=shard_rows) as writer:
        passages = [Passage(f"d{row}", "", f"text {row}") for row in range(200)]
        writer.append(passages, np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32))
    return folder


@pytest.mark.parametrize("shard_rows", [20, 90])
def test_several_processes_build_the_same_index_as_one(python: LoadedPython, tmp_path: Path, shard_rows: int) -> None:
    emb, alone, together = write_store(tmp_path / "emb", shard_rows), tmp_path / "alone", tmp_path / "together"
    build = ("index", "build", "--embeddings", emb, "--factory", "IVF4,SQ8", "--json", "--out")
    assert command(*build, alone).code == 0
    done = python.run(*torchrun(3, "-m", "retriever", *build, together))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["rows"] for line in done.stdout.splitlines()] == [200]
    assert done.stderr.count("bytes a vector") == 1
    for name in ("index.faiss", "ids.txt", "passages.jsonl"):
        assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "emb", "together"]


def test_an_index_of_several_processes_is_tuned(python: LoadedPython, tmp_path: Path) -> None:
    build = ("index", "build", "--embeddings", write_store(tmp_path / "emb", 20), "--out", tmp_path / "i", "--on-disk")
    done = python.run(*torchrun(2, "-m", "retriever", *build, "--target-recall", 0.9, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target_met"] is True
    assert read_manifest(tmp_path / "i").field("tuning", dict)["met"] is True
    assert command("index", "verify", tmp_path / "i").code == 0


def test_unsupported_builds_are_refused_without_leaving_files(python: LoadedPython, tmp_path: Path) -> None:
    out = tmp_path / "i"
    several, single = write_store(tmp_path / "several", 20), write_store(tmp_path / "single", 200)
    for emb, words, message in (
        (
            several,
            ("--factory", "HNSW8"),
            "factory 'HNSW8': expected Flat, SQ…, PQ… or IVF…, whose parts can be merged",
        ),
        (single, (), f"{single}: expected at least two shards for several processes, found 1"),
    ):
        done = python.run(*torchrun(2, "-m", "retriever", "index", "build", "--embeddings", emb, "--out", out, *words))
        errors = [line for line in done.stderr.splitlines() if line.startswith("retriever: ")]
        assert done.returncode != 0 and len(errors) == 1 and message in errors[0], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["several", "single"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "--embeddings", "e", "--out", "o", "--part", "1/2"), "--part: leave it out under torchrun"),
        (("build", "--embeddings", "e", "--out", "o", "--gpu"), "--gpu: leave it out under torchrun"),
        (("tune", "i", "--embeddings", "e"), "index tune: works in one process; start it without torchrun"),
        (("merge", "i", "j", "--out", "o"), "index merge: works in one process"),
        (("add", "i", "--embeddings", "e"), "index add: works in one process"),
        (("delete", "i", "--ids", "a"), "index delete: works in one process"),
    ],
)
def test_options_of_one_process_are_refused(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = command("index", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
