"""Several ranks write one embedding store with the bytes that one process writes."""

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
from retriever.encoding.corpus import StoreOptions, corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions
from retriever.models.modality import load_towers


def corpus_of(path: Path, rows: int) -> Path:
    return write_lines(path, [{"_id": f"d{n}", "text": "cat dog oak "[: n % 13]} for n in range(rows)])


def encoding(world: Any, corpus: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("encode", "--model", world.model, "--data", corpus, "--out", out, "--shard-rows", 10, *more)


def on_ranks(python: LoadedPython, size: int, *words: object) -> subprocess.CompletedProcess[str]:
    return python.run(*torchrun(size, "-m", "retriever", *words))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The last round is complete, incomplete, or of one rank only; or there are fewer shards than ranks.
@pytest.mark.parametrize(("rows", "size", "workers"), [(60, 3, 0), (57, 2, 2), (31, 3, 1), (5, 3, 0)])
def test_ranks_write_the_bytes_of_one_process(
    python: LoadedPython, world: Any, tmp_path: Path, rows: int, size: int, workers: int
) -> None:
    corpus = corpus_of(tmp_path / "corpus.jsonl", rows)
    alone = command(*encoding(world, corpus, tmp_path / "alone"))
    assert alone.code == 0, alone.err
    done = on_ranks(python, size, *encoding(world, corpus, tmp_path / "out", "--workers", workers, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == rows and stored(tmp_path / "out") == stored(tmp_path / "alone")
    # Notices of all ranks are counted together and printed once.
    (notice,) = (line for line in alone.err.splitlines() if "without any text" in line)
    assert [line for line in done.stderr.splitlines() if "without any text" in line] == [notice]


@pytest.mark.parametrize(("shards", "size"), [(1, 3), (2, 2), (4, 3)])
def test_another_number_of_ranks_continues_a_store(
    python: LoadedPython, world: Any, tmp_path: Path, shards: int, size: int
) -> None:
    corpus, out = corpus_of(tmp_path / "corpus.jsonl", 75), tmp_path / "out"

    def interrupted() -> Iterator[Passage]:
        # One shard more, because the window that is being encoded at the error is lost.
        yield from itertools.islice(PassageFile(corpus), 10 * (shards + 1))
        raise InputError("interrupted")

    with pytest.raises(InputError, match="interrupted"):
        encode_passages(
            load_towers(str(world.model)).eval(),
            interrupted(),
            out,
            EncodeOptions(),
            source=corpus_source(corpus),
            storage=StoreOptions(shard_rows=10, window=10),
        )
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
def test_an_error_on_any_rank_is_one_line(
    python: LoadedPython, world: Any, tmp_path: Path, row: int, line: str, message: str
) -> None:
    corpus, out = corpus_of(tmp_path / "corpus.jsonl", 60 if line else 0), tmp_path / "out"
    lines = corpus.read_text().splitlines()
    lines[row : row + 1] = [line]
    corpus.write_text("\n".join(lines))
    done = on_ranks(python, 3, *encoding(world, corpus, out))
    errors = [line for line in done.stderr.splitlines() if line.startswith("retriever: ")]
    assert done.returncode != 0 and len(errors) == 1 and message in errors[0], done.stderr
    # The store has complete shards only, up to the one with the error.
    manifest = read_manifest(out)
    assert not manifest.field("complete", bool) and manifest.count("rows") <= row
    verify_files(manifest, "hash")
