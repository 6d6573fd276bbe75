"""A table whose rows have another width than its header is refused by every reader, with the line."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from cli_helpers import command

from eval.zero_shot.tables import Columns, open_table
from index.beir import read_queries
from index.files import InputError
from index.passages import read_passages
from index.records import read_records
from retriever.config.sources import SourceConfig
from retriever.data.sources import Notices, read_examples


def examples(path: Path) -> Iterable[object]:
    return read_examples(SourceConfig(path=str(path), query="_id", positive="text"), Notices())


READERS: dict[str, Callable[[Path], object]] = {
    "rows": read_records,
    "queries": read_queries,
    "passages": read_passages,
    "pairs": examples,
    "images": lambda path: open_table(path, "test", Columns(image="_id", caption="text")),
}
# Header and rows: with the numbers of the rows, as R writes tables; cut short; with a cell too many.
TABLES = {
    "numbered": (["_id", "text"], [["0", "a", "x"], ["1", "b", "y"]], 2, 3),
    "short": (["_id", "title", "text"], [["a", "t", "x"], ["b", "y"]], 3, 2),
    "long": (["_id", "text"], [["a", "x"], ["b", "y", "z"]], 2, 3),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".tsv.gz"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("reader", READERS)
def test_rows_as_wide_as_their_header(tmp_path: Path, reader: str, table: str, suffix: str) -> None:
    header, rows, expected, found = TABLES[table]
    separator = "," if ".csv" in suffix else "\t"
    text = "".join(separator.join(row) + "\n" for row in [header, *rows]).encode()
    path = tmp_path / f"table{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    line = 2 + next(place for place, row in enumerate(rows) if len(row) != len(header))
    with pytest.raises(InputError, match=rf"table{suffix}:{line}: expected {expected} columns, found {found}"):
        list(READERS[reader](path))  # type: ignore[call-overload]


def test_ids_to_delete_are_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "ids.tsv").write_text("d1\n\nd2\t0.5\n")
    done = command("index", "delete", tmp_path / "none", "--ids-file", tmp_path / "ids.tsv")
    assert done.code == 1 and "ids.tsv:3: expected an id without white space, found 'd2\\t0.5'" in done.err
