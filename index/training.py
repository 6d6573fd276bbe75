"""Training FAISS indexes on vectors drawn at random from an embedding store."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import numpy as np

from index.factory import import_faiss
from index.files import InputError
from index.gpu import clustering
from index.layout import FAISS_FILE
from index.opened import Index, read_trained
from index.settings import core, set_search_defaults
from index.store import EmbeddingStore

# faiss asks for at least 39 training vectors a centroid and uses no more than 256. More of them take time, and memory
# beside the index; a code of one byte counts as 256 centroids.
PER_CENTROID = 64
LEAST = 39
CODE_CENTROIDS = 256


def train(index: Any, store: EmbeddingStore, factory: str, seed: int, *, without: np.ndarray, gpu: bool = False) -> int:
    """Train `index` on rows drawn at random; returns how many, 0 when it needs no training.

    Args:
        index: empty.
        store: where the vectors are drawn from.
        factory: names it in errors.
        seed: of the sample and of k-means.
        without: rows that must not be trained on, because the index will be measured by them.
        gpu: cluster on all GPUs that faiss finds.

    Raises:
        InputError: there are too few vectors.
    """
    if index.is_trained:
        return 0
    faiss = import_faiss()
    inner = core(index)
    centroids = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    if centroids:
        inner.cp.seed = seed
    if store.rows < centroids:
        raise InputError(
            f"factory {factory!r}: expected at least {centroids} vectors to train {centroids} centroids "
            f"({LEAST * centroids} to do it well), found {store.rows}; choose fewer, or 'Flat'"
        )
    wanted = min(PER_CENTROID * max(centroids, CODE_CENTROIDS), store.rows)
    # A small store has none to spare, and of those that it is measured by later each changes the centroids little.
    if store.rows - len(without) < LEAST * max(centroids, CODE_CENTROIDS):
        without = without[:0]
    sample = sample_vectors(store, min(wanted, store.rows - len(without)), seed, without)
    with clustering(index) if gpu else contextlib.nullcontext():
        index.train(sample)
    return len(sample)


def sample_vectors(store: EmbeddingStore, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` vectors [count, D] float32 of different rows drawn at random, none of `without`, in the rows' order."""
    return read_rows(store, sample_rows(store.rows, count, seed, without))


def sample_rows(rows: int, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` different numbers below `rows`, none of `without`, drawn at random and in order, int64."""
    barred = np.empty(0, np.int64) if without is None else without
    # Drawn with as many to spare as may have to be left out, so that no list of all other rows is needed.
    drawn = np.random.default_rng(seed).choice(rows, min(rows, count + len(barred)), replace=False, shuffle=False)
    return np.sort(drawn[~np.isin(drawn, barred)][:count])


def read_rows(store: EmbeddingStore, rows: np.ndarray) -> np.ndarray:
    """The vectors [n, D] float32 of the ascending `rows` [n] of a store."""
    vectors_read = np.empty((len(rows), store.dim), np.float32)
    taken = 0
    for first, vectors in store.shards():
        stop = int(np.searchsorted(rows, first + len(vectors)))
        vectors_read[taken:stop] = vectors[rows[taken:stop] - first]
        taken = stop
    return vectors_read


def trained_part(opened: Index) -> Any:
    """An empty index, with the default search settings, that is trained as `opened` is.

    Raises:
        InputError: faiss cannot read it, or it is not trained as its manifest states: it was made from damaged files.
    """
    index = read_trained(opened.folder / FAISS_FILE)
    set_search_defaults(index)
    stated, found = opened.manifest.field("trained", str), fingerprint(index)
    if found != stated:
        raise InputError(
            f"{opened.folder / FAISS_FILE}: expected the training of sha256 {stated[:12]}… that its manifest states, "
            f"found {found[:12]}…: it was made from a damaged index, or by another version of faiss; build it anew"
        )
    return index


def fingerprint(index: Any) -> str:
    """The sha256 of an empty trained index: two that agree in it encode a vector alike, and can be merged."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexNSG):
        # Nothing sets it before there are vectors.
        inner.nsg.enterpoint = 0
    digest = hashlib.sha256()

    def update(data: bytes) -> int:
        digest.update(data)
        return len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(update))
    return digest.hexdigest()
