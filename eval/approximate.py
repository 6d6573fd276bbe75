"""What an approximate index loses against exact search of the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.evaluate import Find
from eval.measures import measure_name
from eval.metrics import Metrics
from eval.ranking import RankedRun

# As many as keep faiss's threads busy, between two steps of a progress bar.
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Approximation:
    """An index beside exact search, on one set."""

    index: str
    """Its factory string."""
    metrics: Metrics
    overlap: float
    """Share of the passages that exact search ranks first which the index returns as well, at `depth`; 0 to 1."""
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


def approximation(index: str, exact: RankedRun, found: RankedRun, metrics: Metrics, depth: int = 100) -> Approximation:
    """Compare two runs of the same queries over the same passages, perhaps in another order."""
    depth = min(depth, exact.rows.shape[1])
    shares = [len(set(list(exact[q])[:depth]) & set(list(found[q])[:depth])) / depth for q in exact.queries]
    return Approximation(index, metrics, float(np.mean(shares)), depth)


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
