"""Vectors of unit length in 8 bits or 1 bit per value.

A code stands for a direction, so that no scale is stored: the vector of a code is the code divided by its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.shards import QUANTIZED, UNIT_TOLERANCE, dequantized, quantized


class QuantizedStore(EmbeddingStore):
    """The vectors of a store as `retriever encode --dtype int8` or `binary` would store them; nothing is written.

    Files, ids and passages are those of the store.

    Args:
        store: the store; of vectors of unit length.
        dtype: "int8" or "binary".

    Raises:
        InputError: the vectors do not have unit length.
        ValueError: `dtype` is another.
    """

    def __init__(self, store: EmbeddingStore, dtype: str) -> None:
        if dtype not in QUANTIZED:
            raise ValueError(f"dtype: expected one of {', '.join(QUANTIZED)}, found {dtype!r}")
        super().__init__(store.manifest)
        self._full = store
        self.dim = store.dim
        self.model = store.model
        self.dtype = dtype
        self.checked = store.checked
        for _, vectors in store.shards():
            if not abs(float(np.linalg.norm(vectors[0].astype(np.float32))) - 1) <= UNIT_TOLERANCE:
                raise InputError(f"{store.folder}: {dtype}: expected vectors of unit length, found others")
            break

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Verify the sha256 of every file of the store, once per process."""
        self._full.check(progress)
        self.checked = True

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors [n, D] float32 of the codes) of every shard, in order; computed."""
        for first, codes in self.codes():
            yield first, dequantized(codes, self.dtype, self.dim)

    def codes(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, codes) of every shard, in order; see `quantized`."""
        for first, vectors in self._full.shards():
            yield first, quantized(vectors, self.dtype)
