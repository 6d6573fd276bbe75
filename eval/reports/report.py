"""The content of a report: datasets, the metrics of the systems, and their comparisons. files.py writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.compare import ChangedQuery, Pair
from eval.metrics import Metrics, Qrels
from eval.ranking import RankedRun
from eval.sizes import SizeResult


@dataclass(frozen=True)
class Changes:
    """The queries on which two systems differ most, largest change first."""

    pair: Pair
    better: list[ChangedQuery]
    worse: list[ChangedQuery]


@dataclass(frozen=True)
class ReportSet:
    """One dataset: the metrics of each system and their comparisons."""

    name: str
    systems: Mapping[str, Metrics]
    """System -> metrics, in the order of the report; not empty."""
    pairs: list[Pair] = field(default_factory=list)
    changes: list[Changes] = field(default_factory=list)
    runs: Mapping[str, RankedRun] = field(default_factory=dict)
    """System -> run, for the score distributions; optional for each system."""
    qrels: Qrels = field(default_factory=dict)
    """The judgements; needed with `runs`."""
    row: str = ""
    """Sets with the same `row` share a row of the overview: their unweighted mean (the forums of CQADupStack)."""

    @property
    def queries(self) -> int:
        """Number of judged queries."""
        return len(next(iter(self.systems.values())).per_query)


@dataclass(frozen=True)
class Report:
    """A complete report."""

    title: str
    sets: list[ReportSet]
    details: Mapping[str, Any]
    """What is needed to reproduce the report: models and their hashes, configuration, versions, seeds."""
    measure: str = "ndcg@10"
    """The measure of the overview and of the comparisons."""
    absent: list[str] = field(default_factory=list)
    """Requested sets that do not exist on disk."""
    sizes: list[SizeResult] = field(default_factory=list)
    """Metrics with embeddings of other sizes, if they were evaluated."""

    @property
    def systems(self) -> list[str]:
        """The systems of all sets, in order of first occurrence."""
        return list(dict.fromkeys(system for report_set in self.sets for system in report_set.systems))
