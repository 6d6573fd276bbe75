"""A graph measured by passages that it does not yet hold.

A passage in a graph finds its neighbours by its own links, far more easily than a query does (100,000 × 128, HNSW32:
efSearch 6 found 0.96 for passages in it and 0.76 for queries). So those held out come in after tuning, and the rows
are put in order then.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import core, flat_codes
from index.ann.train import read_rows
from index.ann.tuning.recall import Target, Truth, truth_of
from index.store.reader import EmbeddingStore


def is_graph(index: Any) -> bool:
    """Whether `index` searches by walking a graph of its vectors."""
    faiss = import_faiss()
    return isinstance(core(index), faiss.IndexHNSW | faiss.IndexNSG | faiss.IndexNNDescent)


def takes_rows_later(index: Any) -> bool:
    """Whether rows may be added to a graph that is built, and put in another order."""
    faiss = import_faiss()
    return isinstance(core(index), faiss.IndexHNSW) and all(
        isinstance(each, faiss.IndexFlatCodes) for each in flat_codes(index)
    )


def truth_without(store: EmbeddingStore, target: Target, held_out: np.ndarray) -> Truth:
    """What exact search finds for the rows `held_out` among all others, which are numbered without gaps."""
    return truth_of(read_rows(store, held_out), store, held_out, target.k)


def add_held_out(index: Any, store: EmbeddingStore, held_out: np.ndarray) -> None:
    """Add the rows `held_out` to an index of all others, and number all of them as the store does."""
    index.add(read_rows(store, held_out))
    there = np.concatenate([np.delete(np.arange(store.rows), held_out), held_out])
    place_of = np.empty_like(there)
    place_of[there] = np.arange(len(there))
    # A graph orders its storage with itself; what looks again at candidates is ordered beside it.
    for each in (core(index), *flat_codes(index)[1:]):
        each.permute_entries(place_of)
