"""Ids in text files, one per line: random access by row, and detection of duplicates."""

from __future__ import annotations

import hashlib
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np

from index.files import InputError

# Only the offset of every eighth line is kept in memory: 1 byte per id, where a list of strings takes about 60.
LINES_PER_OFFSET = 8
BLOCK_BYTES = 2**22
# Files that are memory-mapped at the same time; each takes a file descriptor.
MAX_MAPPED_FILES = 64


class Ids(Sequence[str]):
    """The ids of N rows as a sequence of strings, read from memory-mapped UTF-8 files with one id per line.

    Memory: 1 byte per id. Access to one id takes some microseconds; iteration is as fast as over a list.

    Args:
        files: the files in the order of their rows, each with its number of ids.

    Raises:
        InputError: a file has another number of ids, or is not UTF-8.
    """

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self._paths = [path for path, _ in files]
        self._firsts = [0, *accumulate(count for _, count in files)]
        self._starts = [_line_starts(path, count) for path, count in files]
        self._mapped = lru_cache(MAX_MAPPED_FILES)(self._map)

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            return self._range(start, stop) if step == 1 else [self[each] for each in range(start, stop, step)]
        count = len(self)
        if not -count <= row < count:
            raise IndexError(f"row {row} of {count} ids")
        number, within = self._locate(row + count if row < 0 else row)
        starts, chunk = self._starts[number], within // LINES_PER_OFFSET
        lines = self._mapped(number)[starts[chunk] : starts[chunk + 1]]
        return lines.split(b"\n", within % LINES_PER_OFFSET + 1)[within % LINES_PER_OFFSET].decode()

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            with open(path, encoding="utf-8", newline="\n") as stream:
                for line in stream:
                    yield line[:-1]

    def _range(self, start: int, stop: int) -> list[str]:
        """The ids of rows `start` to `stop`, which may be in several files."""
        ids: list[str] = []
        while start < stop:
            number, within = self._locate(start)
            count = min(stop, self._firsts[number + 1]) - start
            starts, chunk = self._starts[number], within // LINES_PER_OFFSET
            lines = self._mapped(number)[starts[chunk] : starts[-(-(within + count) // LINES_PER_OFFSET)]]
            skipped = within % LINES_PER_OFFSET
            ids += lines.decode().split("\n")[skipped : skipped + count]
            start += count
        return ids

    def _locate(self, row: int) -> tuple[int, int]:
        number = bisect_right(self._firsts, row) - 1
        return number, row - self._firsts[number]

    def _map(self, number: int) -> mmap.mmap:
        with open(self._paths[number], "rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _line_starts(path: Path, count: int) -> array[int]:
    """Byte offsets of every LINES_PER_OFFSET-th line of a file, and the offset of its end.

    Raises:
        InputError: the file has not `count` lines, or is not UTF-8.
    """
    starts = array("Q", [0])
    lines = position = 0
    rest = b""
    try:
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                block = rest + block
                complete = block.rfind(b"\n") + 1
                rest = block[complete:]
                block[:complete].decode()
                ends = np.flatnonzero(np.frombuffer(block, np.uint8, complete) == ord("\n")) + (position + 1)
                first_end = LINES_PER_OFFSET - 1 - lines % LINES_PER_OFFSET
                starts.frombytes(ends[first_end::LINES_PER_OFFSET].astype(np.uint64).tobytes())
                lines += len(ends)
                position += complete
        rest.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, found: {error}") from None
    if rest or lines != count:
        raise InputError(f"{path}: expected {count} ids, one per line, found {lines + bool(rest)}")
    if starts[-1] != position:
        starts.append(position)
    return starts


def ids_of_rows(ids: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The ids of rows [Q, k], an object array of str [Q, k]; "" for row -1."""
    found = np.full(rows.shape, "", dtype=object)
    for position in zip(*np.nonzero(rows >= 0), strict=True):
        found[position] = ids[int(rows[position])]
    return found


def duplicate_id(files: Sequence[Path]) -> str | None:
    """An id that occurs more than once in `files` (one id per line); None if all differ. Memory: 16 bytes per id."""
    hashes = np.fromiter(map(_hash, _lines(files)), np.uint64)
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    found: set[bytes] = set()
    if suspects:
        for line in _lines(files):
            # Different ids may share a hash: compare the ids themselves.
            if _hash(line) in suspects:
                if line in found:
                    return line.decode()
                found.add(line)
    return None


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as stream:
            for line in stream:
                yield line.rstrip(b"\n")
