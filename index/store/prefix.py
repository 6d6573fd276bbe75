"""An embedding store whose vectors are truncated to their first values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.shards import DTYPES

# Largest difference of a stored vector's length from 1; float16 rounds by less.
UNIT_TOLERANCE = 0.01


def unit_prefix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` values of each vector [n, D], divided by their length: float32 [n, dim]; zeros stay zero."""
    prefix = vectors[:, :dim].astype(np.float32)
    return prefix / np.maximum(np.linalg.norm(prefix, axis=1, keepdims=True), np.finfo(np.float32).tiny)


class PrefixStore(EmbeddingStore):
    """The first `dim` values of each vector of a store, divided by their length; nothing is written.

    Up to rounding, the vectors equal those that the model computes if its embeddings are truncated to `dim`, and
    `model` is the fingerprint of that truncated model. Files, ids and passages are those of the store.

    Args:
        store: the store, whose vectors have unit length.
        dim: number of values to keep, fewer than the store has.

    Raises:
        InputError: `dim` is out of range, or the vectors do not have unit length.
    """

    def __init__(self, store: EmbeddingStore, dim: int) -> None:
        super().__init__(store.manifest)
        if not 1 <= dim < store.dim:
            raise InputError(f"{store.folder}: dim: expected a number from 1 to {store.dim}, found {dim}")
        self._full = store
        self.dim = dim
        self.model = {**store.model, "dim": str(dim)}
        self.dtype = store.dtype if store.dtype == "float16" else "float32"
        self.checked = store.checked
        for _, vectors in store.shards():
            if not abs(float(np.linalg.norm(vectors[0].astype(np.float32))) - 1) <= UNIT_TOLERANCE:
                raise InputError(f"{store.folder}: dim: expected vectors of unit length, found others")
            break

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Verify the sha256 of every file of the store, once per process."""
        self._full.check(progress)
        self.checked = True

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors [n, dim]) of every shard, in order; computed, not memory-mapped."""
        for first, vectors in self._full.shards():
            yield first, unit_prefix(vectors, self.dim).astype(DTYPES[self.dtype], copy=False)


def truncated(store: EmbeddingStore, dim: int | None) -> EmbeddingStore:
    """The store with its vectors truncated to `dim` values and scaled to unit length.

    For None, and if `dim` is the dimension of the store, this is the store itself.

    Raises:
        InputError: see `PrefixStore`.
    """
    return store if dim is None or dim == store.dim else PrefixStore(store, dim)


def truncated_like(store: EmbeddingStore, model: Mapping[str, str]) -> EmbeddingStore:
    """The store, truncated if the model `model` is the truncated form of the model that embedded it."""
    dim = model.get("dim")
    if dim is None or {**store.model, "dim": dim} != dict(model) or store.model == model:
        return store
    return truncated(store, int(dim))
