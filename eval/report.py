"""Reports for people and programs: report.json, report.md with a plot, and one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.compare import ChangedQuery, Pair
from eval.markdown import comparison_table, markdown_of
from eval.measures import HEADLINE, PLOTTED, measure_name
from eval.metrics import Metrics, Qrels
from eval.ranking import RankedRun
from index.files import InputError, atomic_path, write_json

__all__ = [
    "HEADLINE",
    "Changes",
    "Report",
    "ReportSet",
    "comparison_table",
    "measure_name",
    "write",
]

log = logging.getLogger(__name__)


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


def write(folder: Path, report: Report) -> list[Path]:
    """Write report.json, report.md, report.html and, where matplotlib is installed, report.png; each whole or absent.

    Without matplotlib the page has no plots, and a log line says what to install.

    Returns:
        The files written.

    Raises:
        InputError: there is nothing to report.
    """
    from eval import plots
    from eval.html import html_of

    if not report.sets or not all(found.systems for found in report.sets):
        raise InputError(f"{folder}: expected at least one result to report, found none")
    paths = [folder / "report.json", folder / "report.md", folder / "report.html"]
    draw = plots.available()
    plotted = draw and plot(folder / "report.png", report)
    write_json(paths[0], json_of(report))
    for path, text in ((paths[1], markdown_of(report, plotted)), (paths[2], html_of(report, draw))):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*paths, folder / "report.png"] if plotted else paths


def json_of(report: Report) -> dict[str, Any]:
    """The report for programs; the values of single queries are in the run files and need not be kept twice."""
    return {
        "title": report.title,
        "measure": report.measure,
        "details": dict(report.details),
        "sets": {
            found.name: {
                "queries": found.queries,
                "systems": {
                    name: {"mean": metrics.mean, "missing_queries": metrics.missing}
                    for name, metrics in found.systems.items()
                },
                "comparisons": [_pair_json(pair) for pair in found.pairs],
                "changes": [_changes_json(changes) for changes in found.changes],
            }
            for found in report.sets
        },
        "absent": list(report.absent),
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    values = dataclasses.asdict(pair)
    test = values.pop("test")
    # JSON knows no infinity; the statistic has none where every query differs by the same amount.
    test["t"] = test["t"] if abs(test["t"]) < float("inf") else None
    return {**values, **test}


def _changes_json(changes: Changes) -> dict[str, Any]:
    return {
        "a": changes.pair.a,
        "b": changes.pair.b,
        "better": [dataclasses.asdict(query) for query in changes.better],
        "worse": [dataclasses.asdict(query) for query in changes.worse],
    }


def plot(path: Path, report: Report) -> bool:
    """Draw the headline measures as bars to a PNG file; False (and a log line) where not every system has one."""
    from eval import plots

    measures = [
        measure
        for measure in PLOTTED
        if all(measure in metrics.mean for found in report.sets for metrics in found.systems.values())
    ]
    if not measures:
        log.warning("no plot: the cut-offs include neither nDCG@10 nor recall@100")
        return False
    with plots.style():
        plots.to_png(plots.bars({found.name: found.systems for found in report.sets}, measures), path)
    return True
