"""Hybrid rankings: several runs of the same queries fused into one, by rank or by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.ranking import RankedRun

METHODS = ("rrf", "minmax", "zscore")
RRF_K = 60


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
        weights: one a run, 0 or more, not all 0; all 1 if not given. For score fusion α and 1 − α are usual.
        k: passages a query in the fused run at most.
        rrf_k: how slowly "rrf" falls with the rank.

    Returns:
        The queries of all runs, those of the first run first.

    Raises:
        ValueError: an unknown method, fewer than two runs, wrong weights, an infinite score under a score method, or
            `k` or `rrf_k` below 1.
    """
    shares = [1.0] * len(runs) if weights is None else [float(weight) for weight in weights]
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two to fuse, found {len(runs)}")
    if len(shares) != len(runs) or not all(0 <= share < np.inf for share in shares) or not any(shares):
        raise ValueError(f"weights: expected {len(runs)} numbers of 0 or more, not all 0, found {shares}")
    for name, value in (("k", k), ("rrf_k", rrf_k)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    ranked = [RankedRun.of(run) for run in runs]
    queries = list(dict.fromkeys(query for run in ranked for query in run.queries))
    table, rows_in = _common_rows(ranked)
    fused_rows = np.full((len(queries), k), -1, dtype=np.int64)
    fused_scores = np.full(fused_rows.shape, -np.inf)
    for number, query in enumerate(queries):
        found, given, absent = [], [], 0.0
        for run, rows, share in zip(ranked, rows_in, shares, strict=True):
            place = run.place(query)
            count = 0 if place is None else int((run.rows[place] >= 0).sum())
            if not count:
                continue
            values, lowest = _values(run.scores[place, :count].astype(np.float64), method, rrf_k)
            found.append(rows[place, :count])
            # Every passage starts from what those absent get, so a passage's own value stands above that.
            given.append(share * (values - lowest))
            absent += share * lowest
        if found:
            best_rows, best_scores = _best(np.concatenate(found), np.concatenate(given), absent, table, k)
            fused_rows[number, : len(best_rows)], fused_scores[number, : len(best_rows)] = best_rows, best_scores
    width = max(1, int((fused_rows >= 0).sum(axis=1).max(initial=0)))
    return RankedRun(queries, table, fused_rows[:, :width], fused_scores[:, :width])


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


def _values(scores: np.ndarray, method: str, rrf_k: int) -> tuple[np.ndarray, float]:
    """What a run gives to the passages it ranked, best first [n], and to those it did not."""
    if method == "rrf":
        return 1.0 / (rrf_k + np.arange(1, len(scores) + 1)), 0.0
    if not np.isfinite(scores).all():
        raise ValueError("runs: expected finite scores to fuse, found infinity")
    spread = np.ptp(scores) if method == "minmax" else scores.std()
    if not np.ptp(scores):
        return (np.ones_like(scores) if method == "minmax" else np.zeros_like(scores)), 0.0
    values = (scores - (scores.min() if method == "minmax" else scores.mean())) / spread
    return values, 0.0 if method == "minmax" else float(values.min())


def _best(
    rows: np.ndarray, given: np.ndarray, absent: float, table: Sequence[str], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the distinct rows and their summed scores; ties at the cut go by id, descending."""
    distinct, inverse = np.unique(rows, return_inverse=True)
    # As the run keeps and compares them.
    scores = (absent + np.bincount(inverse, weights=given)).astype(np.float32)
    if len(distinct) > k:
        cut = np.partition(scores, -k)[-k]
        kept = np.flatnonzero(scores >= cut)
        order = sorted(kept.tolist(), key=lambda place: (scores[place], table[int(distinct[place])]), reverse=True)[:k]
        distinct, scores = distinct[order], scores[order]
    return distinct, scores
