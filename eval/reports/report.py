"""What a report says: data sets, the systems measured on them, and how those differ. files.py writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.compare import ChangedQuery, Pair
from eval.metrics import Metrics, Qrels
from eval.ranking import RankedRun


@dataclass(frozen=True)
class Changes:
    """Where two systems of a set differ most, largest change first."""

    pair: Pair
    better: list[ChangedQuery]
    worse: list[ChangedQuery]


@dataclass(frozen=True)
class ReportSet:
    """One data set: what each system scored on it, and how they compare."""

    name: str
    systems: Mapping[str, Metrics]
    """System -> metrics, in the order wanted; not empty."""
    pairs: list[Pair] = field(default_factory=list)
    changes: list[Changes] = field(default_factory=list)
    runs: Mapping[str, RankedRun] = field(default_factory=dict)
    """System -> run, for the score distributions; those that are not there have none."""
    qrels: Qrels = field(default_factory=dict)
    """Needed with `runs`."""
    row: str = ""
    """Sets with the same row share one in the overview, their unweighted mean (the forums of CQADupStack)."""

    @property
    def queries(self) -> int:
        """Judged queries."""
        return len(next(iter(self.systems.values())).per_query)


@dataclass(frozen=True)
class Report:
    """What was measured, on what, by what."""

    title: str
    sets: list[ReportSet]
    details: Mapping[str, Any]
    """What is needed to do it again: models and their hashes, configuration, versions, seeds."""
    measure: str = "ndcg@10"
    """What the overview shows and the systems are compared by."""
    absent: list[str] = field(default_factory=list)
    """Sets that were asked for and are not here."""

    @property
    def systems(self) -> list[str]:
        """Every system of any set, in the order they come in."""
        return list(dict.fromkeys(system for found in self.sets for system in found.systems))
