"""What `retriever encode` leaves out of a store: unreadable images, and on request rows that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from index.files import InputError, atomic_path
from index.passages import parse_passage
from index.records import lazy_rows

LEFT_OUT = "left_out.jsonl"
"""File in the folder of a store that names what was left out, with the reasons."""


def broken_rows(
    corpus: Path, fields: Sequence[str] = (), progress: Callable[[int], None] | None = None
) -> dict[int, str]:
    """Read a corpus and find the rows that are no passages.

    Args:
        corpus: the file of passages.
        fields: fields that are read with each passage.
        progress: called with the number of rows read since the last call.

    Returns:
        Number of each row that cannot be read, the first row being 0, and the reason, which names file and line.

    Raises:
        InputError: the file cannot be divided into rows, for example because it is a damaged archive.
    """
    broken = {}
    for number, row in enumerate(lazy_rows(corpus)):
        try:
            parse_passage(row(), fields)
        except InputError as error:
            broken[number] = str(error)
        if progress is not None:
            progress(1)
    return broken


def write_left_out(folder: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write LEFT_OUT in the folder of a store, an object for each row; returns the file."""
    with atomic_path(folder / LEFT_OUT) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder / LEFT_OUT
