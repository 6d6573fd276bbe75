"""Training FAISS indexes on a sample of an embedding store."""

from __future__ import annotations

from typing import Any

import numpy as np

from index.factory import import_faiss
from index.files import InputError
from index.store import EmbeddingStore

# faiss asks for at least 39 training vectors a centroid and uses no more than 256; a million is plenty between them.
TRAINING_ROWS = 1_000_000


def train(index: Any, store: EmbeddingStore, factory: str, seed: int) -> int:
    """Train `index` on rows drawn at random; returns how many, 0 when it needs no training."""
    if index.is_trained:
        return 0
    faiss = import_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    centroids = 0
    if ivf is not None:
        centroids = ivf.nlist
        ivf.cp.seed = seed
    if store.rows < centroids:
        raise InputError(
            f"factory {factory!r}: expected at least {centroids} vectors to train {centroids} centroids "
            f"({39 * centroids} to do it well), found {store.rows}; choose fewer, or 'Flat'"
        )
    wanted = min(max(TRAINING_ROWS, 39 * centroids), 256 * max(centroids, 256), store.rows)
    index.train(sample_vectors(store, wanted, seed))
    return wanted


def sample_vectors(store: EmbeddingStore, count: int, seed: int) -> np.ndarray:
    """`count` vectors [count, D] float32 of different rows drawn at random, in the order of the rows."""
    rows = np.sort(np.random.default_rng(seed).choice(store.rows, count, replace=False, shuffle=False))
    sample = np.empty((count, store.dim), np.float32)
    taken = 0
    for first, vectors in store.shards():
        stop = int(np.searchsorted(rows, first + len(vectors)))
        sample[taken:stop] = vectors[rows[taken:stop] - first]
        taken = stop
    return sample
