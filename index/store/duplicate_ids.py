"""Detecting duplicate ids with 8 bytes per id, most of them on disk: only a 64-bit hash of each id is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Sorted runs of up to this many hashes stay in memory; longer ones are memory-mapped files.
_IN_MEMORY_ROWS = 1 << 17


class DuplicateFinder:
    """A set of ids that reports possible duplicates.

    Two different ids may share a hash (once in 370,000 corpora of ten million ids), so the caller must compare the ids
    themselves before it reports a duplicate.

    The hashes are stored in sorted runs, each longer than all later ones together (O'Neil et al., "The Log-Structured
    Merge-Tree", 1996). They come from Python's `hash`, which differs between processes.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is where long runs are stored, in unnamed temporary files."""
        self._folder = folder
        self._runs: list[npt.NDArray[np.int64]] = []

    def possible_duplicates(self, ids: Sequence[str]) -> list[int]:
        """Positions in `ids`, ascending, of ids that may have been added before or may occur earlier in `ids`."""
        hashes = _hashes(ids)
        # Sorted queries read each run from its beginning to its end.
        order = np.argsort(hashes, kind="stable")
        ascending = hashes[order]
        suspect = np.zeros(len(ids), dtype=bool)
        suspect[1:] = ascending[1:] == ascending[:-1]
        for run in self._runs:
            position = np.minimum(np.searchsorted(run, ascending), len(run) - 1)
            suspect |= run[position] == ascending
        return sorted(order[suspect].tolist())

    def add(self, ids: Sequence[str]) -> None:
        """Add ids."""
        if not ids:
            return
        run = np.sort(_hashes(ids))
        while self._runs and len(self._runs[-1]) <= len(run):
            run = self._merge(self._runs.pop(), run)
        self._runs.append(run)

    def _merge(self, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        size = len(one) + len(other)
        if size <= _IN_MEMORY_ROWS:
            merged = np.empty(size, dtype=np.int64)
        else:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                merged = np.memmap(file, dtype=np.int64, mode="w+", shape=(size,))
        np.concatenate([one, other], out=merged)
        merged.sort()
        return merged


def _hashes(ids: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
