"""What an approximate index loses against exact search of the same vectors."""

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

# As many as keep faiss's threads busy, between two steps of a progress bar.
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Approximation:
    """An index beside exact search, on one set."""

    index: str
    """Its factory string."""
    metrics: Metrics
    overlap: float
    """Recall of the index at `depth`, 0 to 1: the share of its first passages that are right, those whose exact score
    is at least that of the last one of exact search there, but for rounding (index.recall)."""
    depth: int

    def loss(self, exact: Metrics, measure: str) -> float:
        """By how much the index is worse; negative where it is better by chance."""
        return exact.mean[measure] - self.metrics.mean[measure]

    def as_json(self, exact: Metrics) -> dict[str, Any]:
        """For programs: its means, and what it loses of each."""
        return {
            "factory": self.index,
            "mean": self.metrics.mean,
            "loss": {measure: self.loss(exact, measure) for measure in exact.mean},
            f"overlap@{self.depth}": self.overlap,
        }


def approximation(
    index: str, exact: RankedRun, found: RankedRun, metrics: Metrics, products: Products, depth: int = 100
) -> Approximation:
    """Compare two runs of the same queries over the same passages, perhaps in another order.

    Args:
        index: its factory string.
        exact: the run of exact search.
        found: that of the index.
        metrics: of `found`.
        products: of the queries, in the order of `exact`, and the passages of `exact`.
        depth: passages a query that are compared.

    Raises:
        InputError: the index finds a passage that the set does not have.
    """
    exact, found = exact.cut(depth), found.cut(depth)
    wanted = (exact.rows >= 0).sum(axis=1)
    right = np.zeros(len(exact.queries), np.int64)
    # Passages that exact search does not have there, which may score like its last one.
    others: list[tuple[int, str]] = []
    for place, query in enumerate(exact.queries):
        ours, theirs = exact[query].keys(), found[query].keys()
        right[place] = len(ours & theirs)
        others += [(place, passage) for passage in theirs - ours if ours]
    if others:
        row_of = rows_of(exact.passages, {passage for _, passage in others})
        for _, passage in others:
            if passage not in row_of:
                raise InputError(
                    f"index {index}: expected the passages of the set, found {passage}, which is not there"
                )
        places = np.array([place for place, _ in others])
        unlike = np.unique(places)
        last, rounding = np.empty(len(wanted)), np.empty(len(wanted))
        last[unlike], rounding[unlike] = products(unlike, exact.rows[unlike, wanted[unlike] - 1])
        scores, errors = products(places, np.array([row_of[passage] for _, passage in others]))
        reached = scores + errors >= last[places] - rounding[places]
        right += np.bincount(places[reached], minlength=len(right))
    shares = np.minimum(right, wanted) / np.maximum(wanted, 1)
    overlap = float(np.mean(np.where(wanted > 0, shares, 1.0)))
    return Approximation(index, metrics, overlap, int(wanted.max(initial=0)))


def search_by_parts(find: Find, progress: Callable[[int], None]) -> Find:
    """`find` for some queries after the other, with `progress` called with their number."""

    def find_by_parts(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for start in range(0, max(1, len(queries)), QUERIES_AT_ONCE):
            some = queries[start : start + QUERIES_AT_ONCE]
            found.append(find(some, k))
            progress(len(some))
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    return find_by_parts


def approximation_table(exact: Mapping[str, Metrics], found: Mapping[str, Approximation], measure: str) -> str:
    """A Markdown table: exact and approximate values side by side, with the loss between them."""
    shown = measure_name(measure)
    lines = [f"| set | index | {shown}, exact | {shown}, index | loss | overlap |", "|---|---|---:|---:|---:|---:|"]
    for name, other in found.items():
        both = f"{exact[name].mean[measure]:.4f} | {other.metrics.mean[measure]:.4f}"
        values = f"{both} | {other.loss(exact[name], measure):+.4f}"
        lines.append(f"| {name} | {other.index} | {values} | {other.overlap:.4f} at {other.depth} |")
    return "\n".join(lines) + "\n"
