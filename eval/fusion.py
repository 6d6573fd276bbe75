"""Fusion of runs into a hybrid ranking: reciprocal rank fusion and score fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError
from index.ties import best_first, id_ranks

WEIGHTS = "numbers that are 0 or from 1e-6 to 1e6, not all 0"
METHODS = ("rrf", "minmax", "zscore")
RRF_K = 60
# Queries per batch; several arrays of their rankings are in memory at once.
QUERY_BATCH = 1024


def fuse(
    runs: Sequence[Mapping[str, Mapping[str, float]]],
    method: str = "rrf",
    *,
    weights: Sequence[float] | None = None,
    k: int = 1000,
    rrf_k: int = RRF_K,
) -> RankedRun:
    """Fuse runs: rank the union of their passages by the weighted sum of their normalized scores.

    The methods normalize the score of a passage in a run as follows:

    - "rrf": 1 / (rrf_k + rank), with ranks from 1 in trec_eval's order. Reciprocal rank fusion (Cormack, Clarke and
      Büttcher, SIGIR 2009, with rrf_k = 60) ignores the scores.
    - "minmax": (score − min) / (max − min) over the passages of the run for the query; 1 if all scores are equal.
    - "zscore": (score − mean) / standard deviation (population) over the same passages; 0 if all scores are equal.

    A passage that a run did not return gets 0 from it, or with "zscore" the run's lowest value for the query, since 0
    would be the mean. A run without the query contributes nothing.

    Args:
        runs: at least two runs.
        method: "rrf", "minmax" or "zscore".
        weights: one weight per run, 0 or from 1e-6 to 1e6, not all 0; by default 1 each. Score fusion often takes α
            and 1 − α.
        k: maximum number of passages per query in the fused run.
        rrf_k: the constant of "rrf", at least 1; larger values flatten the differences between ranks.

    Returns:
        The fused run with the queries of all runs, those of the first run first.

    Raises:
        InputError: a score is infinite and the method uses scores.
        ValueError: the method is unknown, there are fewer than two runs, the weights are invalid, or `k` or `rrf_k` is
            below 1.
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
    ranks = id_ranks(table)
    width = max(1, min(k, sum(run.rows.shape[1] for run in ranked)))
    fused_rows = np.full((len(queries), width), -1, dtype=np.int64)
    fused_scores = np.full(fused_rows.shape, -np.inf)
    positions = [np.array([-1 if (row := run.position(query)) is None else row for query in queries]) for run in ranked]
    for start in range(0, len(queries), QUERY_BATCH):
        part = slice(start, start + QUERY_BATCH)
        found, contributions, absent_scores = [], [], np.zeros(len(queries[part]))
        for run, rows, position, share in zip(ranked, rows_in, positions, shares, strict=True):
            query_rows = np.where(position[part, None] >= 0, rows[position[part]], -1) if len(run) else rows[:0]
            if not query_rows.size:
                continue
            values, lowest = _normalized(query_rows >= 0, run.scores[position[part]].astype(np.float64), method, rrf_k)
            found.append(query_rows)
            # `absent_scores` is the sum for a passage in no run; each run adds its value above its absent score.
            contributions.append(share * (values - lowest[:, None]))
            absent_scores += share * lowest
        if found:
            best = _top_k(np.hstack(found), np.hstack(contributions), absent_scores, ranks, width)
            fused_rows[part], fused_scores[part] = best
    deepest = max(1, int((fused_rows >= 0).sum(axis=1).max(initial=0)))
    return RankedRun(queries, table, fused_rows[:, :deepest], fused_scores[:, :deepest])


def are_weights(values: Sequence[float]) -> bool:
    """Whether float32, in which sums are ranked, holds what these weights give."""
    return all(value == 0 or 1e-6 <= value <= 1e6 for value in values) and any(values)


def _common_rows(runs: Sequence[RankedRun]) -> tuple[list[str], list[np.ndarray]]:
    """A common table of the passages of all runs, and the rows [Q, K] of each run translated to that table."""
    row_of: dict[str, int] = {}
    translated = []
    for run in runs:
        used = np.unique(run.rows[run.rows >= 0])
        ours = np.array([row_of.setdefault(run.passages[row], len(row_of)) for row in used.tolist()], dtype=np.int64)
        positions = np.searchsorted(used, run.rows).clip(max=max(0, len(used) - 1))
        translated.append(np.where(run.rows >= 0, ours[positions], -1) if len(used) else run.rows.astype(np.int64))
    return list(row_of), translated


def _normalized(ranked: np.ndarray, scores: np.ndarray, method: str, rrf_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized scores [n, K] of the `ranked` passages, and the normalized score [n] of a passage not in the run."""
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


def _top_k(
    rows: np.ndarray, contributions: np.ndarray, absent_scores: np.ndarray, ranks: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The top k distinct rows of each query and their summed scores, [n, k] each (index/ties.py).

    Args:
        rows: [n, K], rows of the common table; -1 for padding.
        contributions: [n, K], the values to add to `absent_scores`.
        absent_scores: [n], the sum for a passage in no run.
        ranks: the `id_ranks` of the table.
        k: passages per query.
    """
    queries, columns = np.nonzero(rows >= 0)
    keys, inverse = np.unique(queries * np.int64(len(ranks)) + rows[queries, columns], return_inverse=True)
    query, row = keys // len(ranks), keys % len(ranks)
    # Rounded to float32 before sorting, because runs store and compare float32 scores.
    sums = (absent_scores[query] + np.bincount(inverse, weights=contributions[queries, columns])).astype(np.float32)
    order = best_first(sums, ranks[row], query)
    counts = np.bincount(query, minlength=len(rows))
    position = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    order, position = order[position < k], position[position < k]
    best_rows = np.full((len(rows), k), -1, dtype=np.int64)
    best_scores = np.full(best_rows.shape, -np.inf)
    best_rows[query[order], position], best_scores[query[order], position] = row[order], sums[order]
    return best_rows, best_scores
