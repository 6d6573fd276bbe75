"""The candidates of a query: the texts that score highest, without duplicates and positives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retriever.mining.texts import Keys, text_key

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def find_candidates(
    search: Search, queries: np.ndarray, keys: Keys, excluded: Sequence[Keys], depth: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the scores and rows of the best `depth` passages with distinct texts for each query, if there are as many.

    If duplicates leave a query too few, the corpus is searched again for it, twice as deep each time.

    Args:
        search: (queries [M, D], k) -> scores and rows [M, min(k, N)], best first; missing rows are −1.
        queries: [Q, D].
        keys: [N], the keys of the passages' texts. Only the best passage of equal ones is taken.
        excluded: For each query, the keys of texts that are not taken; the empty text is never taken.
        depth: Number of candidates, at least 1.
    """
    empty = np.array([text_key("")], np.uint64)
    candidates: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0, np.int64))] * len(queries)
    # Few queries have many positives, and they are searched again.
    k = depth + min(max(map(len, excluded), default=0), depth) + 1
    remaining = np.arange(len(queries))
    while len(remaining):
        unfinished = []
        for query, scores, rows in zip(remaining.tolist(), *search(queries[remaining], min(k, len(keys))), strict=True):
            scores, rows = scores[rows >= 0], rows[rows >= 0]
            texts = keys[rows]
            is_first = np.zeros(len(rows), bool)
            is_first[np.unique(texts, return_index=True)[1]] = True
            taken = np.flatnonzero(is_first & ~np.isin(texts, np.concatenate([excluded[query], empty])))[:depth]
            candidates[query] = scores[taken], rows[taken]
            # An index that returns fewer than k rows has no more.
            if len(taken) < depth and k < len(keys) and len(rows) == min(k, len(keys)):
                unfinished.append(query)
        remaining = np.array(unfinished, np.int64)
        k *= 2
    return candidates


def select(
    scores: np.ndarray,
    best_positive: float,
    *,
    negatives: int,
    max_share: float | None,
    margin: float | None,
    max_score: float | None,
    min_score: float | None,
    seed: Sequence[int] | None,
) -> np.ndarray:
    """Return the positions of the candidates that are taken as negatives, in order.

    Args:
        scores: [n] scores of the candidates, best first.
        best_positive: The score of the best positive of the row.
        negatives: Maximum number of negatives.
        max_share: See `MiningOptions`, as the next three.
        margin: Distance to the best positive.
        max_score: Upper limit.
        min_score: Lower limit.
        seed: Seed of a random choice. None: the first candidates are taken.

    Returns:
        int64 [at most `negatives`]
    """
    limit = np.float32(np.inf)
    if max_share is not None:
        limit = min(limit, np.float32(best_positive - (1.0 - max_share) * abs(best_positive)))
    if margin is not None:
        limit = min(limit, np.float32(best_positive - margin))
    if max_score is not None:
        limit = min(limit, np.float32(max_score))
    allowed = scores <= limit
    if min_score is not None:
        allowed &= scores >= np.float32(min_score)
    positions = np.flatnonzero(allowed)
    if seed is None or len(positions) <= negatives:
        return positions[:negatives]
    return np.sort(np.random.default_rng(seed).choice(positions, negatives, replace=False))
