"""Estimated build time of indexes that fit no machine here, from the amount of work and rates measured on this one.

Clustering multiplies all vectors of the sample with all centroids, ten times; adding a vector finds its list and
computes its code. Rates are processor time, hence of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from index.ann.factory import make
from index.ann.settings import set_add_effort
from index.ann.train import PER_CENTROID
from scripts.datasets.index_sets import clustered

# Centroids of the measured k-means, and of the graph that vectors are looked up in.
KMEANS_LISTS = 1024
CENTROIDS = 65536
ADDED = 20_000


class Rates:
    """Rates for vectors of `dim` dimensions, measured once."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        vectors = clustered(CENTROIDS, dim, CENTROIDS // 100, seed=1)
        self._vectors = np.ascontiguousarray(vectors[:ADDED])
        index = make(f"IVF{KMEANS_LISTS},Flat", dim)
        cost = _seconds(lambda: index.train(vectors))
        self._product = cost / (index.cp.niter * len(vectors) * KMEANS_LISTS)
        # Only the graph is built. The vectors serve as centroids, without clustering.
        self._index = make(f"IVF{CENTROIDS}_HNSW32,Flat", dim)
        quantizer = faiss.downcast_index(self._index.quantizer)
        self._graph = _seconds(lambda: quantizer.add(vectors)) / CENTROIDS
        set_add_effort(self._index)
        self._look_up = _seconds(lambda: quantizer.search(self._vectors, 1)) / ADDED

    def clustering(self, lists: int) -> float:
        """Core seconds to train `lists` centroids and to build their graph."""
        sample = PER_CENTROID * lists
        return float(self._product * self._index.cp.niter * sample * lists + self._graph * lists)

    def adding(self, code: str, rows: int) -> float:
        """Core seconds to add `rows` vectors, each with a `code` such as SQ8."""
        index: Any = make(code, self.dim)
        index.train(self._vectors)
        return float(rows * (self._look_up + _seconds(lambda: index.add(self._vectors)) / ADDED))


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of `work` on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        faiss.omp_set_num_threads(threads)
