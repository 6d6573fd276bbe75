"""A part of an embedding store, for indexes that several machines build together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from index.background import Beside
from index.files import InputError
from index.manifest import verify_files
from index.store.reader import EmbeddingStore

# Vectors converted to float32 and given to faiss at once. Each call wakes faiss's threads anew: with 8 MiB, filling an
# index of one byte a number took 1.7 times as long as with all of it at once, and with 64 MiB 1.05 times.
PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts of a store, from 1: whole shards, in order. 1 of 1 is the store.

    Raises:
        InputError: there is no such part, or it would be empty.
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
        """How many rows it has."""
        return min(self._shards.stop * self.store.shard_rows, self.store.rows) - self.first

    @property
    def _shards(self) -> range:
        shards = len(self.store.files("npy"))
        return range(shards * (self.number - 1) // self.count, shards * self.number // self.count)

    def files(self, suffix: Literal["npy", "ids", "jsonl"]) -> list[Path]:
        """The files of its shards."""
        return self.store.files(suffix)[self._shards.start : self._shards.stop]

    @property
    def in_one_piece(self) -> bool:
        """Whether `pieces` gives it all at once."""
        return len(self._shards) == 1 and self.rows <= self._piece_rows

    @property
    def _piece_rows(self) -> int:
        return max(1, PIECE_BYTES // (4 * self.store.dim))

    def pieces(self, without: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Its vectors [n, D] float32, at most 64 MiB at a time; those of the store's rows `without` are left out."""
        step = self._piece_rows
        for number, (first, vectors) in enumerate(self.store.shards()):
            if number in self._shards:
                for start in range(0, len(vectors), step):
                    piece = np.ascontiguousarray(vectors[start : start + step], np.float32)
                    if without is not None and len(without):
                        rows = without - (first + start)
                        piece = np.delete(piece, rows[(rows >= 0) & (rows < len(piece))], axis=0)
                    yield piece

    def check_beside(self, beside: Beside) -> None:
        """Check every byte of its files beside other work, file by file, unless the store was checked before."""
        if not self.store.checked:
            for path in (*self.files("npy"), *self.files("ids"), *self.files("jsonl")):
                beside.begin(verify_files, self.store.manifest.of([path.name]), "hash")
