"""Ids in files of one a line: read by row where they lie, and looked through for one that stands twice."""

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

# The byte at which every eighth line begins is kept in memory: a byte an id, where a list of texts takes about 60.
EVERY = 8
BLOCK_BYTES = 2**22
# Files mapped at the same time; each takes one of the process's descriptors.
MAPPED = 64


class Ids(Sequence[str]):
    """The ids of N rows, in files of one a line, UTF-8; mapped, and made text when asked for. Memory: 1 byte an id.

    To look at one costs some microseconds; to go through all of them no more than a list does.

    Args:
        files: the files, in the order of their rows, each with its number of ids.

    Raises:
        InputError: a file has not as many ids, or is no UTF-8.
    """

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self._paths = [path for path, _ in files]
        self._firsts = [0, *accumulate(count for _, count in files)]
        self._starts = [_line_starts(path, count) for path, count in files]
        self._mapped = lru_cache(MAPPED)(self._map)

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
        number, within = self._place(row + count if row < 0 else row)
        starts, chunk = self._starts[number], within // EVERY
        lines = self._mapped(number)[starts[chunk] : starts[chunk + 1]]
        return lines.split(b"\n", within % EVERY + 1)[within % EVERY].decode()

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            with open(path, encoding="utf-8", newline="\n") as stream:
                for line in stream:
                    yield line[:-1]

    def _range(self, start: int, stop: int) -> list[str]:
        """The ids from `start` to `stop`, which may lie in several files."""
        ids: list[str] = []
        while start < stop:
            number, within = self._place(start)
            count = min(stop, self._firsts[number + 1]) - start
            starts, chunk = self._starts[number], within // EVERY
            lines = self._mapped(number)[starts[chunk] : starts[-(-(within + count) // EVERY)]]
            skipped = within % EVERY
            ids += lines.decode().split("\n")[skipped : skipped + count]
            start += count
        return ids

    def _place(self, row: int) -> tuple[int, int]:
        number = bisect_right(self._firsts, row) - 1
        return number, row - self._firsts[number]

    def _map(self, number: int) -> mmap.mmap:
        with open(self._paths[number], "rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _line_starts(path: Path, count: int) -> array[int]:
    """The byte at which lines 0, EVERY, 2 EVERY … of the file begin, and the byte after the last of `count` lines."""
    starts = array("Q", [0])
    lines = position = 0
    rest = b""
    try:
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                block = rest + block
                whole = block.rfind(b"\n") + 1
                rest = block[whole:]
                block[:whole].decode()
                ends = np.flatnonzero(np.frombuffer(block, np.uint8, whole) == ord("\n")) + (position + 1)
                starts.frombytes(ends[EVERY - 1 - lines % EVERY :: EVERY].astype(np.uint64).tobytes())
                lines += len(ends)
                position += whole
        rest.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, found: {error}") from None
    if rest or lines != count:
        raise InputError(f"{path}: expected {count} ids, one a line, found {lines + bool(rest)}")
    if starts[-1] != position:
        starts.append(position)
    return starts


def duplicate_id(files: Sequence[Path]) -> str | None:
    """An id that stands more than once in `files` of ids, one a line; None when all differ. Memory: 16 bytes an id."""
    hashes = np.fromiter(map(_hash, _lines(files)), np.uint64)
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: set[bytes] = set()
    if suspects:
        for line in _lines(files):
            # Two ids may share a hash: only the ids themselves tell.
            if _hash(line) in suspects:
                if line in seen:
                    return line.decode()
                seen.add(line)
    return None


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as stream:
            for line in stream:
                yield line.rstrip(b"\n")
