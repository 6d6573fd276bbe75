"""Comparison of an approximate index with exact search of the same embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.evaluate import Find, Products
from eval.measures import measure_name
from eval.metrics import Metrics
from eval.ranking import RankedRun, rows_of
from index.files import InputError

# Enough queries to keep faiss's threads busy, few enough for a smooth progress bar.
QUERY_BATCH = 512


@dataclass(frozen=True)
class Approximation:
    """An approximate index compared with exact search on one set."""

    index: str
    """The faiss factory string."""
    metrics: Metrics
    """Metrics of the index's run."""
    overlap: float
    """Recall of the index at `depth` against exact search, 0 to 1: the share of its top passages whose exact score is
    at least that of the last passage of exact search at that depth, up to float32 rounding."""
    depth: int
    """Number of passages per query that were compared."""

    def loss(self, exact: Metrics, measure: str) -> float:
        """The exact mean minus the index's mean of `measure`; negative if the index scores higher by chance."""
        return exact.mean[measure] - self.metrics.mean[measure]

    def as_json(self, exact: Metrics) -> dict[str, Any]:
        """The means of the index and their losses against exact search, for JSON."""
        return {
            "factory": self.index,
            "mean": self.metrics.mean,
            "loss": {measure: self.loss(exact, measure) for measure in exact.mean},
            f"overlap@{self.depth}": self.overlap,
        }


def approximation(
    index: str, exact: RankedRun, found: RankedRun, metrics: Metrics, products: Products, depth: int = 100
) -> Approximation:
    """Compare the run of an index with the run of exact search, by exact scores.

    A passage of the index that exact search did not return counts as correct if its exact score ties with the last
    score of exact search, so that the order of ties does not matter. The two runs may number passages differently.

    Args:
        index: the faiss factory string.
        exact: the run of exact search.
        found: the run of the index, over the same queries.
        metrics: the metrics of `found`.
        products: exact inner products of (query, passage) pairs, numbered as in `exact`.
        depth: passages per query to compare.

    Returns:
        The overlap and metrics of the index; `depth` is smaller if the exact run is shallower.

    Raises:
        InputError: the index returned a passage that the set does not contain.
    """
    exact, found = exact.cut(depth), found.cut(depth)
    depths = (exact.rows >= 0).sum(axis=1)
    hits = np.zeros(len(exact.queries), np.int64)
    # Passages that only the index returned; they may tie with the last one of exact search.
    extra: list[tuple[int, str]] = []
    for query_row, query in enumerate(exact.queries):
        exact_ids, found_ids = exact[query].keys(), found[query].keys()
        hits[query_row] = len(exact_ids & found_ids)
        extra += [(query_row, passage) for passage in found_ids - exact_ids if exact_ids]
    if extra:
        row_of = rows_of(exact.passages, {passage for _, passage in extra})
        for _, passage in extra:
            if passage not in row_of:
                raise InputError(
                    f"index {index}: expected the passages of the set, found {passage}, which is not there"
                )
        query_rows = np.array([query_row for query_row, _ in extra])
        affected = np.unique(query_rows)
        last, last_error = np.empty(len(depths)), np.empty(len(depths))
        last[affected], last_error[affected] = products(affected, exact.rows[affected, depths[affected] - 1])
        scores, errors = products(query_rows, np.array([row_of[passage] for _, passage in extra]))
        tied = scores + errors >= last[query_rows] - last_error[query_rows]
        hits += np.bincount(query_rows[tied], minlength=len(hits))
    shares = np.minimum(hits, depths) / np.maximum(depths, 1)
    overlap = float(np.mean(np.where(depths > 0, shares, 1.0)))
    return Approximation(index, metrics, overlap, int(depths.max(initial=0)))


def search_by_parts(find: Find, progress: Callable[[int], None]) -> Find:
    """Search in batches of queries and call `progress` with the number of queries in each batch."""

    def find_by_parts(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for start in range(0, max(1, len(queries)), QUERY_BATCH):
            batch = queries[start : start + QUERY_BATCH]
            found.append(find(batch, k))
            progress(len(batch))
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    return find_by_parts


def approximation_table(exact: Mapping[str, Metrics], found: Mapping[str, Approximation], measure: str) -> str:
    """A Markdown table with one row per set: exact value, index value, loss and overlap."""
    shown = measure_name(measure)
    lines = [f"| set | index | {shown}, exact | {shown}, index | loss | overlap |", "|---|---|---:|---:|---:|---:|"]
    for name, other in found.items():
        both = f"{exact[name].mean[measure]:.4f} | {other.metrics.mean[measure]:.4f}"
        values = f"{both} | {other.loss(exact[name], measure):+.4f}"
        lines.append(f"| {name} | {other.index} | {values} | {other.overlap:.4f} at {other.depth} |")
    return "\n".join(lines) + "\n"
