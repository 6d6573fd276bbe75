"""`retriever encode` under torchrun: ranks write one store together, of the bytes that one process writes."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command, write_lines
from forks import LoadedPython, torchrun

from index.files import InputError
from index.manifest import read_manifest, verify_files
from index.passages import Passage, PassageFile
from retriever.encoding.corpus import corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions
from retriever.models.towers import load_towers


def corpus_of(path: Path, rows: int) -> Path:
    return write_lines(path, [{"_id": f"d{n}", "text": "cat dog oak "[: n % 13]} for n in range(rows)])


def encoding(world: Any, corpus: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("encode", "--model", world.model, "--data", corpus, "--out", out, "--shard-rows", 10, *more)


def on_ranks(python: LoadedPython, size: int, *words: object) -> subprocess.CompletedProcess[str]:
    return python.run(*torchrun(size, "-m", "retriever", *words))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The last round of the ranks is whole, short, of one rank alone, and there are fewer shards than ranks.
@pytest.mark.parametrize(("rows", "size", "workers"), [(60, 3, 0), (57, 2, 2), (31, 3, 1), (5, 3, 0)])
def test_ranks_write_what_one_process_writes(
    python: LoadedPython, world: Any, tmp_path: Path, rows: int, size: int, workers: int
) -> None:
    corpus = corpus_of(tmp_path / "corpus.jsonl", rows)
    alone = command(*encoding(world, corpus, tmp_path / "alone"))
    assert alone.code == 0, alone.err
    done = on_ranks(python, size, *encoding(world, corpus, tmp_path / "out", "--workers", workers, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == rows and stored(tmp_path / "out") == stored(tmp_path / "alone")
    # What is odd on any rank is told once.
    (odd,) = (line for line in alone.err.splitlines() if "without any text" in line)
    assert [line for line in done.stderr.splitlines() if "without any text" in line] == [odd]


@pytest.mark.parametrize(("shards", "size"), [(1, 3), (2, 2), (4, 3)])
def test_ranks_continue_what_another_number_began(
    python: LoadedPython, world: Any, tmp_path: Path, shards: int, size: int
) -> None:
    corpus, out = corpus_of(tmp_path / "corpus.jsonl", 75), tmp_path / "out"

    def torn() -> Iterator[Passage]:
        # One more: the window that is on its way when the corpus ends so is lost.
        yield from itertools.islice(PassageFile(corpus), 10 * (shards + 1))
        raise InputError("torn")

    with pytest.raises(InputError, match="torn"):
        source: Any = {"source": corpus_source(corpus), "shard_rows": 10, "window": 10}
        encode_passages(load_towers(str(world.model)).eval(), torn(), out, EncodeOptions(), **source)
    assert read_manifest(out).count("rows") == 10 * shards
    assert on_ranks(python, size, *encoding(world, corpus, out)).returncode == 0
    assert command(*encoding(world, corpus, tmp_path / "alone")).code == 0
    assert stored(out) == stored(tmp_path / "alone")


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (25, '{"_id": "broken', r"corpus.jsonl:26: expected JSON"),
        (44, '{"_id": "d3", "text": "again"}', "expected unique ids, found 'd3' in rows 3 and 44"),
        (17, '{"_id": "two words", "text": ""}', "corpus.jsonl:18: expected an id without white space"),
        (0, "", "expected passages, found none"),
    ],
)
def test_the_error_of_any_rank_is_one_line(
    python: LoadedPython, world: Any, tmp_path: Path, row: int, line: str, message: str
) -> None:
    corpus, out = corpus_of(tmp_path / "corpus.jsonl", 60 if line else 0), tmp_path / "out"
    lines = corpus.read_text().splitlines()
    lines[row : row + 1] = [line]
    corpus.write_text("\n".join(lines))
    done = on_ranks(python, 3, *encoding(world, corpus, out))
    said = [each for each in done.stderr.splitlines() if each.startswith("retriever: ")]
    assert done.returncode != 0 and len(said) == 1 and message in said[0], done.stderr
    # What was taken in is whole, and nothing from the shard at fault on.
    manifest = read_manifest(out)
    assert not manifest.field("complete", bool) and manifest.count("rows") <= row
    verify_files(manifest, "hash")
