"""The order of passages with equal scores, everywhere in this project.

A ranked list is sorted by score, a float32, descending. Passages with equal scores are sorted by id, descending: by
code points, which is the order of Python's `str` and of UTF-8 bytes. This is the order of trec_eval. It also decides
which of the passages that tie at rank k are in the top k. So search, fusion, BM25 and evaluation agree on a list,
whatever the order in which blocks, ranks and indexes were searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def id_ranks(ids: Sequence[str]) -> np.ndarray:
    """The rank of each id among the ids, in ascending order; of equal scores, the highest rank comes first.

    Returns:
        int64 [N].
    """
    ranks = np.empty(len(ids), np.int64)
    ranks[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return ranks


def best_first(scores: np.ndarray, ranks: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """The positions that sort scored passages, best first.

    Args:
        scores: [P], any floating dtype; they are compared as they are.
        ranks: int [P], the `id_ranks` of the passages.
        groups: int [P], for example the queries: the positions of each group are together, the lowest group first.
            Default: None, one group.

    Returns:
        int64 [P].
    """
    return np.lexsort((-ranks, -scores) if groups is None else (-ranks, -scores, groups))


def order_ties(scores: np.ndarray, rows: np.ndarray, ids: Sequence[str]) -> None:
    """Sort the rows of equal scores, in place. Only the ids of rows with equal scores are read.

    Args:
        scores: [Q, K], descending.
        rows: int [Q, K], rows of `ids`; -1 for padding, at the end. Rows with the same id keep their order.
        ids: the id of each row.
    """
    tied = (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)
    for query in np.flatnonzero(tied.any(axis=1)):
        edges = np.flatnonzero(np.diff(tied[query], prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            group = rows[query, first : last + 1]
            group[:] = sorted(group.tolist(), key=ids.__getitem__, reverse=True)
