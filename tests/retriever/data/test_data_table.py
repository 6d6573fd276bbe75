"""Tables are converted once, complete or absent, and read by row with constant memory."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retriever.data.table as table_module
from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example, Notices, read_examples
from retriever.data.table import open_source


def pairs(path: Path, count: int) -> SourceConfig:
    rows = ({"query": f"query {i}", "positive": [f"p {i}", f"r {i}"], "negatives": f"n {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(path))


def example(number: int) -> Example:
    return Example(f"query {number}", (f"p {number}", f"r {number}"), (f"n {number}",))


def test_every_row_is_read_back_across_record_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "BATCH_ROWS", 7)
    advances: list[int] = []
    table = open_source(pairs(tmp_path / "a.jsonl", 30), tmp_path / "cache", progress=advances.append)
    assert [table[row] for row in range(len(table))] == [example(row) for row in range(30)]
    assert advances == [7, 7, 7, 7, 2]
    for row in (-1, 30):
        with pytest.raises(IndexError):
            table[row]


def test_large_texts_close_a_record_batch_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "BATCH_CHARACTERS", 1)
    advances: list[int] = []
    table = open_source(pairs(tmp_path / "a.jsonl", 3), tmp_path / "cache", progress=advances.append)
    assert advances == [1, 1, 1]
    assert table[2] == example(2)


def test_a_source_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    config = pairs(tmp_path / "a.jsonl", 3)
    first = open_source(config, tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    assert open_source(config, tmp_path / "cache").path.stat().st_mtime_ns == written
    assert open_source(SourceConfig(config.path, weight=2.0), tmp_path / "cache").path == first.path
    pairs(tmp_path / "a.jsonl", 4)
    assert len(open_source(config, tmp_path / "cache")) == 4
    assert len(first) == 3


def test_other_columns_are_converted_separately(tmp_path: Path) -> None:
    config = pairs(tmp_path / "a.jsonl", 2)
    open_source(config, tmp_path / "cache")
    swapped = SourceConfig(config.path, positive="negatives", negatives="positive")
    assert open_source(swapped, tmp_path / "cache")[1] == Example("query 1", ("n 1",), ("p 1", "r 1"))


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    config = pairs(tmp_path / "a.jsonl", 5000)
    with open(config.path, "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(InputError, match=r"a\.jsonl:5001: expected JSON"):
        open_source(config, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pairs(tmp_path / "a.jsonl", 5)

    def read_and_change(config: SourceConfig, notices: Notices) -> Iterator[Example]:
        yield from read_examples(config, notices)
        pairs(tmp_path / "a.jsonl", 6)

    monkeypatch.setattr(table_module, "read_examples", read_and_change)
    with pytest.raises(InputError, match=r"a\.jsonl: changed while it was read"):
        open_source(config, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_without_examples_is_refused_with_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "", "positive": "p"}\n' * 2)
    with pytest.raises(InputError, match=r"at least one example, found none; rows skipped for an empty query: 2"):
        open_source(SourceConfig(str(path)), tmp_path / "cache")
    path.write_text("")
    with pytest.raises(InputError, match="at least one example, found none"):
        open_source(SourceConfig(str(path)), tmp_path / "cache")


def test_notices_are_stored_with_the_table(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "", "positive": "p"}\n{"query": "q", "positive": "p"}\n')
    for _ in range(2):
        table = open_source(SourceConfig(str(path)), tmp_path / "cache")
        assert table.notices == [f"rows skipped for an empty query: 1 (first at {path}:1)"]
        assert table.name == str(path)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    config = pairs(tmp_path / "a.jsonl", 100)
    path = open_source(config, tmp_path / "cache").path
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="cannot be read"):
        open_source(config, tmp_path / "cache")


def test_a_table_can_be_pickled_to_another_process(tmp_path: Path) -> None:
    table = open_source(pairs(tmp_path / "a.jsonl", 10), tmp_path / "cache")
    sent = pickle.dumps(table)
    assert len(sent) < 500
    assert pickle.loads(sent)[7] == example(7)  # noqa: S301


def _convert(config: SourceConfig, cache: Path) -> int:
    table = open_source(config, cache)
    assert table[len(table) - 1] == example(len(table) - 1)
    return len(table)


def test_processes_may_convert_at_the_same_time(tmp_path: Path) -> None:
    config = pairs(tmp_path / "a.jsonl", 20_000)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        rows = pool.starmap(_convert, [(config, tmp_path / "cache")] * 3, chunksize=1)
    assert rows == [20_000] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 2


MEASURE = """
import json, sys
from pathlib import Path
import numpy, pyarrow
from retriever.config.sources import SourceConfig
from retriever.data.table import open_source

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

folder = Path(sys.argv[1])
small = folder / "small.jsonl"
with open(small, "w") as stream:
    for row in range(100):
        stream.write(json.dumps({"query": f"{row} word", "positive": f"{row} " + "passage " * 250}) + "\\n")
open_source(SourceConfig(str(small)), folder / "cache")
before = memory("VmHWM:")
table = open_source(SourceConfig(str(folder / "large.jsonl")), folder / "cache")
converted = memory("VmHWM:") - before
anonymous = memory("RssAnon:")
for row in range(0, len(table), 10):
    table[row]
print(len(table), converted, memory("RssAnon:") - anonymous)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows = 100_000
    with open(tmp_path / "large.jsonl", "w") as stream:
        for row in range(rows):
            stream.write(json.dumps({"query": f"{row} word", "positive": f"{row} " + "passage " * 250}) + "\n")
    size = (tmp_path / "large.jsonl").stat().st_size / 2**20
    assert size > 190
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    found, converted, read = map(float, done.stdout.split())
    assert found == rows
    assert converted < 100, f"converting {size:.0f} MiB grew the process by {converted:.0f} MiB"
    assert read < 20, f"reading {size:.0f} MiB grew the process by {read:.0f} MiB"


def test_a_source_that_is_not_copied_gives_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"query": f"große {i}", "positive": [f"p {i}"], "negatives": ["n"] * (i % 2), "kind": "k: " if i % 3 else None}
        for i in range(20)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + "\n".join([*lines[:5], "", json.dumps({"query": " ", "positive": "x"}), *lines[5:]]))
    config = SourceConfig(str(path), query_prompt_column="kind", copy=False)
    path.write_text(path.read_text().replace('"positive": "x"', '"positive": "x", "kind": null'))
    copied = open_source(dataclasses.replace(config, copy=True), tmp_path / "cache")
    table = pickle.loads(pickle.dumps(open_source(config, tmp_path / "lines")))  # noqa: S301
    assert [table[row] for row in range(len(table))] == [copied[row] for row in range(len(copied))]
    assert list(table.texts(7)) == list(copied.texts(7)) and table.prompts() == copied.prompts() == (["k: "], [])
    for name in ("notices", "rows_with_negatives", "rows_with_scores", "rows_skipped"):
        assert getattr(table, name) == getattr(copied, name)
    # Only the positions of the rows are on disk, and they are used again.
    assert sum(file.stat().st_size for file in (tmp_path / "lines").glob("*.npy")) == 128 + 16 * 20
    assert open_source(config, tmp_path / "lines").sha256 == table.sha256
    with pytest.raises(InputError, match=r"a\.csv: expected a \.jsonl file with copy false"):
        (tmp_path / "a.csv").write_text("query,positive\na,b\n")
        open_source(SourceConfig(str(tmp_path / "a.csv"), copy=False), tmp_path / "lines")
    path.write_text(path.read_text() + "\n[1]\n")
    with pytest.raises(InputError, match=r"changed since the run began"):
        pickle.loads(pickle.dumps(table))  # noqa: S301
    with pytest.raises(InputError, match=r"a\.jsonl:23: expected a JSON object"):
        open_source(config, tmp_path / "lines")
