"""Rows of scripts/results/*.csv, written as they come."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from index.files import atomic_path


def write_rows(rows: Sequence[Mapping[str, Any]], table: Path) -> None:
    """Write rows of the same columns, whole or not at all."""
    with atomic_path(table) as path, path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
