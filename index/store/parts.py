"""A part of an embedding store, for indexes that several machines build together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from index.background import BackgroundTasks
from index.files import InputError
from index.manifest import verify_files
from index.store.reader import EmbeddingStore

# Vectors are converted to float32 and passed to faiss in pieces of this size. Each call starts faiss's threads again:
# filling an SQ8 index takes 1.7 times as long in 8 MiB pieces as in a single one, and 1.05 times in 64 MiB pieces.
PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count` parts of a store: a range of whole shards. Part 1 of 1 is the whole store.

    Raises:
        InputError: `number` is out of range, or the part would be empty.
    """

    store: EmbeddingStore
    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(f"part {self.number}/{self.count}: expected a number from 1 to {self.count}")
        if not self.store.rows:
            raise InputError(f"{self.store.folder}: expected passages to index, found none")
        if not self.rows:
            shards = len(self.store.files("npy"))
            raise InputError(
                f"{self.store.folder}: expected at most {shards} parts, as many as it has shards, found {self.count}"
            )

    @property
    def first(self) -> int:
        """Its first row in the store."""
        return min(self._shards.start * self.store.shard_rows, self.store.rows)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return min(self._shards.stop * self.store.shard_rows, self.store.rows) - self.first

    @property
    def _shards(self) -> range:
        shards = len(self.store.files("npy"))
        return range(shards * (self.number - 1) // self.count, shards * self.number // self.count)

    def files(self, suffix: Literal["npy", "ids", "jsonl"]) -> list[Path]:
        """Paths of its shard files with this suffix."""
        return self.store.files(suffix)[self._shards.start : self._shards.stop]

    @property
    def in_one_piece(self) -> bool:
        """Whether `pieces` yields a single array."""
        return len(self._shards) == 1 and self.rows <= self._piece_rows

    @property
    def _piece_rows(self) -> int:
        return max(1, PIECE_BYTES // (4 * self.store.dim))

    def pieces(self, without: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yield its vectors as [n, D] float32 arrays of at most 64 MiB.

        Args:
            without: rows of the store, ascending int64, that are left out.
        """
        step = self._piece_rows
        for number, (first, vectors) in enumerate(self.store.shards()):
            if number in self._shards:
                for start in range(0, len(vectors), step):
                    piece = np.ascontiguousarray(vectors[start : start + step], np.float32)
                    if without is not None and len(without):
                        rows = without - (first + start)
                        piece = np.delete(piece, rows[(rows >= 0) & (rows < len(piece))], axis=0)
                    yield piece

    def check_in_background(self, background: BackgroundTasks) -> None:
        """Check every byte of its files in `background`, one task per file, unless the store was checked before."""
        if not self.store.checked:
            for path in (*self.files("npy"), *self.files("ids"), *self.files("jsonl")):
                background.submit(verify_files, self.store.manifest.of([path.name]), "hash")
