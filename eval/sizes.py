"""Metrics of one model with smaller embeddings: fewer dimensions, or fewer bits per value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.measures import HEADLINE, measure_name, shown
from eval.metrics import Metrics

# Bits of a value of an embedding.
BITS = {"float32": 32, "float16": 16, "binary+int8": 9, "int8": 8, "binary": 1}


@dataclass(frozen=True)
class SizeResult:
    """The metrics with embeddings of one size."""

    dim: int
    """Dimensions of an embedding."""
    precision: str
    """Precision of its values, a key of BITS."""
    rows: Mapping[str, Metrics]
    """Row of the result table -> metrics."""

    @property
    def bytes(self) -> int:
        """Bytes of an embedding."""
        return math.ceil(self.dim * BITS[self.precision] / 8)

    def mean(self, measure: str) -> float:
        """The unweighted mean of a measure over the rows."""
        return math.fsum(metrics.mean[measure] for metrics in self.rows.values()) / len(self.rows)

    def as_json(self) -> dict[str, Any]:
        """Size and means by row, for JSON."""
        means = {name: metrics.mean for name, metrics in self.rows.items()}
        return {"dim": self.dim, "precision": self.precision, "bytes": self.bytes, "sets": means}


def size_cells(results: Sequence[SizeResult], measure: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of sizes, largest first.

    The columns are the headline measures of a single set; of several sets, `measure` of each and their mean. The last
    column is `measure` as a share of its value at the largest size.
    """
    results = sorted(results, key=lambda result: (-result.bytes, -result.dim))
    sets = list(results[0].rows)
    head = ["dimensions", "values", "bytes"]
    if len(sets) == 1:
        measures = [measure, *shown(HEADLINE, results[0].rows[sets[0]].mean.keys())]
        columns = [(sets[0], name) for name in dict.fromkeys(measures)]
        head += [measure_name(name) for _, name in columns]
    else:
        columns = [(name, measure) for name in sets]
        head += [*(f"{name}, {measure_name(measure)}" for name in sets), "mean"]
    largest = results[0].mean(measure)
    rows = []
    for result in results:
        values = [f"{result.rows[name].mean[column]:.4f}" for name, column in columns]
        values += [f"{result.mean(measure):.4f}"] if len(sets) > 1 else []
        share = f"{result.mean(measure) / largest:.1%}" if largest else "–"
        rows.append([str(result.dim), result.precision, f"{result.bytes:,}", *values, share])
    return [*head, "of the first"], rows
