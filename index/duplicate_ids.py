"""Which ids a store holds already, in eight bytes each and most of them on disk: a hash of 64 bits stands for an id."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Hashes that stay in memory as they are; longer runs lie in a file, whose pages the system takes back at need.
_IN_MEMORY = 1 << 17


class SeenIds:
    """A set of ids that tells which ones it may hold. Two ids of ten million share a hash once in 370,000 corpora, so
    a suspect is looked at before it is refused.

    The hashes lie in sorted runs, each longer than all after it (O'Neil et al., "The Log-Structured Merge-Tree",
    1996). Hashes are Python's own, other ones in every process.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: on the disk that long runs go to, in files without a name."""
        self._folder = folder
        self._runs: list[npt.NDArray[np.int64]] = []

    def suspects(self, ids: Sequence[str]) -> list[int]:
        """Places of the ids that were perhaps entered before, or stand earlier in `ids`; rising."""
        hashes = _hashes(ids)
        # In this order the runs are read from their beginning to their end.
        order = np.argsort(hashes, kind="stable")
        rising = hashes[order]
        suspect = np.zeros(len(ids), dtype=bool)
        suspect[1:] = rising[1:] == rising[:-1]
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, rising), len(run) - 1)
            suspect |= run[place] == rising
        return sorted(order[suspect].tolist())

    def enter(self, ids: Sequence[str]) -> None:
        """Add ids."""
        if not ids:
            return
        run = np.sort(_hashes(ids))
        while self._runs and len(self._runs[-1]) <= len(run):
            run = self._merged(self._runs.pop(), run)
        self._runs.append(run)

    def _merged(self, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        size = len(one) + len(other)
        if size <= _IN_MEMORY:
            merged = np.empty(size, dtype=np.int64)
        else:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                merged = np.memmap(file, dtype=np.int64, mode="w+", shape=(size,))
        np.concatenate([one, other], out=merged)
        merged.sort()
        return merged


def _hashes(ids: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
