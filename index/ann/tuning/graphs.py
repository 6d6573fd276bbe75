"""Measuring the recall of a graph with passages that it does not contain.

A passage that is in a graph is found through its own links, far more easily than by a query: in 100,000 × 128 with
HNSW32 and efSearch 6, recall is 0.96 for passages in the graph and 0.76 for queries. So held-out passages are added
after tuning, and rows are then put in their final order.
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
    """Whether `index` searches a graph of its vectors."""
    faiss = import_faiss()
    return isinstance(core(index), faiss.IndexHNSW | faiss.IndexNSG | faiss.IndexNNDescent)


def can_add_later(index: Any) -> bool:
    """Whether vectors can be added to a graph that was built, and its rows be permuted."""
    faiss = import_faiss()
    return isinstance(core(index), faiss.IndexHNSW) and all(
        isinstance(each, faiss.IndexFlatCodes) for each in flat_codes(index)
    )


def truth_for_held_out(store: EmbeddingStore, target: Target, held_out: np.ndarray) -> Truth:
    """The exact neighbors of the rows `held_out` among all other rows, which are renumbered without gaps."""
    return truth_of(read_rows(store, held_out), store, held_out, target.k)


def add_held_out(index: Any, store: EmbeddingStore, held_out: np.ndarray) -> None:
    """Add the rows `held_out` to an index of all other rows, and restore the row numbers of the store."""
    index.add(read_rows(store, held_out))
    store_rows = np.concatenate([np.delete(np.arange(store.rows), held_out), held_out])
    place_of = np.empty_like(store_rows)
    place_of[store_rows] = np.arange(len(store_rows))
    # permute_entries of a graph also permutes its storage; refinements are permuted separately.
    for each in (core(index), *flat_codes(index)[1:]):
        each.permute_entries(place_of)
