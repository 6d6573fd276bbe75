"""Passages of an index, one JSON line each, read by row without reading the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from index.files import InputError, parse_json, read_at
from index.passages import Passage, parse_stored_passage
from index.records import Record
from index.store.arrays import map_array

# Bytes read at once of the line of a passage.
LINE_BYTES = 2**13


class PassageLines:
    """The passages of N rows. The files stay open, and several threads may read.

    Args:
        lines: the file of the passages.
        size: its size in bytes.
        offsets: the file of the offsets at which their lines begin, uint64 [N].
        ids: the ids that they must have.
        ids_name: the name of the file of the ids, for messages.

    Raises:
        InputError: a file cannot be read, or is not of N rows.
    """

    def __init__(self, lines: Path, size: int, offsets: Path, ids: Sequence[str], ids_name: str) -> None:
        self._path, self._size, self._offsets_path = lines, size, offsets
        self._ids, self._ids_name = ids, ids_name
        self._offsets = map_array(offsets, np.dtype("<u8"), (len(ids),))
        self._file = open(lines, "rb")  # noqa: SIM115 - open as long as the index

    def __getitem__(self, row: int) -> Passage:
        """Read the passage of a row, 0 to N - 1.

        Raises:
            IndexError: `row` is out of range.
            InputError: the line on disk is not a passage, or has the id of another row.
        """
        if not 0 <= row < len(self._ids):
            raise IndexError(f"row {row} of an index of {len(self._ids)}")
        place = f"{self._path}:{row + 1}"
        offset, file = int(self._offsets[row]), self._file.fileno()
        before = read_at(file, 1, offset - 1) if 0 < offset < self._size else b"\n"
        if offset >= self._size or before != b"\n":
            found = f"expected where line {row + 1} of {self._path.name} begins, found byte {offset}"
            raise InputError(f"{self._offsets_path}: damaged: {found}")
        line = b""
        while b"\n" not in line and (block := read_at(file, LINE_BYTES, offset + len(line))):
            line += block
        line = line.partition(b"\n")[0]
        try:
            fields = parse_json(line.decode(), place)
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: expected UTF-8, found: {error}") from None
        if not isinstance(fields, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(fields).__name__}")
        passage = parse_stored_passage(Record(place, fields))
        if passage.id != self._ids[row]:
            found = f"found {passage.id!r:.60} in {self._path.name} and {self._ids[row]!r:.60} in {self._ids_name}"
            raise InputError(f"{self._path.parent}: damaged: expected one id for row {row}, {found}")
        return passage
