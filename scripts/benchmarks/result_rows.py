"""Reading and writing the CSV files in scripts/results."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from index.files import atomic_path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows to a CSV file, replacing it as a whole.

    The columns are those of all rows, in order of first appearance. A row without a column leaves it empty.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def update_rows(rows: Sequence[Mapping[str, Any]], path: Path, key: Sequence[str]) -> None:
    """Write rows to a CSV file in place of its rows that have the same values in the columns `key`; keep the others."""
    replaced = {tuple(str(row[column]) for column in key) for row in rows}
    old = read_rows(path) if path.exists() else []
    kept = [row for row in old if tuple(row[column] for column in key) not in replaced]
    # The new rows determine the order of the columns.
    columns = dict.fromkeys(column for row in (*rows, *kept) for column in row)
    write_rows([{column: row.get(column, "") for column in columns} for row in (*kept, *rows)], path)


def identity(row: Mapping[str, Any], key: Sequence[str]) -> tuple[str, ...]:
    """The values of a row in the columns `key`, which tell it from rows that need not be measured again."""
    return tuple(str(row.get(column, "")) for column in key)


def identities(path: Path, key: Sequence[str]) -> set[tuple[str, ...]]:
    """The values in the columns `key` of all rows of a CSV file; none if there is no file."""
    return {identity(row, key) for row in read_rows(path)} if path.exists() else set()
