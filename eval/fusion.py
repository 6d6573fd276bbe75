"""Hybrid rankings: several runs of the same queries fused into one, by rank or by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError

WEIGHTS = "numbers that are 0 or from 1e-6 to 1e6, not all 0"
METHODS = ("rrf", "minmax", "zscore")
RRF_K = 60
# Some arrays of all their places are held at once.
QUERIES_AT_ONCE = 1024


def fuse(
    runs: Sequence[Mapping[str, Mapping[str, float]]],
    method: str = "rrf",
    *,
    weights: Sequence[float] | None = None,
    k: int = 1000,
    rrf_k: int = RRF_K,
) -> RankedRun:
    """Rank the union of what the runs found; a passage's score is the weighted sum of what each run gives it.

    What a run gives to a passage that it ranked:

    - "rrf": 1 / (rrf_k + rank), ranks from 1 in trec_eval's order. Reciprocal rank fusion (Cormack, Clarke and
      Büttcher, SIGIR 2009; there rrf_k is 60). Scores play no part.
    - "minmax": (score − min) / (max − min), over the passages that the run has for the query; 1 where all are equal.
    - "zscore": (score − mean) / standard deviation (of that population), likewise; 0 where all are equal.

    To a passage that it did not rank, a run gives 0; under "zscore" its lowest value for that query, because there 0
    is the mean. A query that a run lacks gets nothing from it.

    Args:
        runs: at least two.
        weights: one a run, 0 or from 1e-6 to 1e6, not all 0; all 1 if not given. For score fusion α and 1 − α are
            usual.
        k: passages a query in the fused run at most.
        rrf_k: how slowly "rrf" falls with the rank.

    Returns:
        The queries of all runs, those of the first run first.

    Raises:
        InputError: an infinite score under a method that adds scores.
        ValueError: an unknown method, fewer than two runs, wrong weights, or `k` or `rrf_k` below 1.
    """
    shares = [1.0] * len(runs) if weights is None else [float(weight) for weight in weights]
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two to fuse, found {len(runs)}")
    if len(shares) != len(runs) or not are_weights(shares):
        raise ValueError(f"weights: expected {len(runs)} of {WEIGHTS}, found {shares}")
    for name, value in (("k", k), ("rrf_k", rrf_k)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    ranked = [RankedRun.of(run) for run in runs]
    queries = list(dict.fromkeys(query for run in ranked for query in run.queries))
    table, rows_in = _common_rows(ranked)
    id_rank = np.empty(len(table), dtype=np.int64)
    id_rank[sorted(range(len(table)), key=table.__getitem__)] = np.arange(len(table))
    width = max(1, min(k, sum(run.rows.shape[1] for run in ranked)))
    fused_rows = np.full((len(queries), width), -1, dtype=np.int64)
    fused_scores = np.full(fused_rows.shape, -np.inf)
    places = [np.array([-1 if (at := run.place(query)) is None else at for query in queries]) for run in ranked]
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        found, given, absent = [], [], np.zeros(len(queries[part]))
        for run, rows, place, share in zip(ranked, rows_in, places, shares, strict=True):
            own_rows = np.where(place[part, None] >= 0, rows[place[part]], -1) if len(run) else rows[:0]
            if not own_rows.size:
                continue
            values, lowest = _values(own_rows >= 0, run.scores[place[part]].astype(np.float64), method, rrf_k)
            found.append(own_rows)
            # Every passage starts from what those absent get, so a passage's own value stands above that.
            given.append(share * (values - lowest[:, None]))
            absent += share * lowest
        if found:
            best = _best(np.hstack(found), np.hstack(given), absent, id_rank, width)
            fused_rows[part], fused_scores[part] = best
    deepest = max(1, int((fused_rows >= 0).sum(axis=1).max(initial=0)))
    return RankedRun(queries, table, fused_rows[:, :deepest], fused_scores[:, :deepest])


def are_weights(values: Sequence[float]) -> bool:
    """Whether float32, in which sums are ranked, holds what these weights give."""
    return all(value == 0 or 1e-6 <= value <= 1e6 for value in values) and any(values)


def _common_rows(runs: Sequence[RankedRun]) -> tuple[list[str], list[np.ndarray]]:
    """One table of the passages that the runs name, and each run's rows [Q, K] as rows of that table."""
    row_of: dict[str, int] = {}
    translated = []
    for run in runs:
        used = np.unique(run.rows[run.rows >= 0])
        ours = np.array([row_of.setdefault(run.passages[row], len(row_of)) for row in used.tolist()], dtype=np.int64)
        places = np.searchsorted(used, run.rows).clip(max=max(0, len(used) - 1))
        translated.append(np.where(run.rows >= 0, ours[places], -1) if len(used) else run.rows.astype(np.int64))
    return list(row_of), translated


def _values(ranked: np.ndarray, scores: np.ndarray, method: str, rrf_k: int) -> tuple[np.ndarray, np.ndarray]:
    """What a run gives to the places [n, K] that are `ranked`, best first, and to passages that it did not rank [n]."""
    if method == "rrf":
        values = np.broadcast_to(1.0 / (rrf_k + np.arange(1, scores.shape[1] + 1)), scores.shape)
        return values, np.zeros(len(scores))
    if not np.isfinite(scores[ranked]).all():
        raise InputError("runs: expected finite scores to fuse, found infinity")
    count = np.maximum(1, ranked.sum(axis=1, keepdims=True))
    low = np.where(ranked, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(ranked, scores, -np.inf).max(axis=1, keepdims=True)
    equal = ~(high > low)
    if method == "minmax":
        above = np.where(ranked & ~equal, scores - low, 1.0)
        return above / np.where(equal, 1.0, high - low), np.zeros(len(scores))
    mean = np.where(ranked, scores, 0.0).sum(axis=1, keepdims=True) / count
    away = np.where(ranked, scores - mean, 0.0)
    values = np.where(equal, 0.0, away / np.where(equal, 1.0, np.sqrt((away**2).sum(axis=1, keepdims=True) / count)))
    return values, np.where(ranked, values, np.inf).min(axis=1, where=ranked, initial=0.0)


def _best(
    rows: np.ndarray, given: np.ndarray, absent: np.ndarray, id_rank: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best distinct rows of each query and their summed scores, [n, k] each; ties go by id, descending.

    Args:
        rows: [n, K] of the common table; -1 for none.
        given: [n, K], what they add to `absent` [n].
        id_rank: of each row of the table, its id's place in ascending order.
    """
    queries, columns = np.nonzero(rows >= 0)
    keys, inverse = np.unique(queries * np.int64(len(id_rank)) + rows[queries, columns], return_inverse=True)
    query, row = keys // len(id_rank), keys % len(id_rank)
    # float32, as the run keeps and compares them.
    sums = (absent[query] + np.bincount(inverse, weights=given[queries, columns])).astype(np.float32)
    order = np.lexsort((-id_rank[row], -sums, query))
    counts = np.bincount(query, minlength=len(rows))
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    order, place = order[place < k], place[place < k]
    best_rows = np.full((len(rows), k), -1, dtype=np.int64)
    best_scores = np.full(best_rows.shape, -np.inf)
    best_rows[query[order], place], best_scores[query[order], place] = row[order], sums[order]
    return best_rows, best_scores
