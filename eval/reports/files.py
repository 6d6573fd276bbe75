"""Write a report to disk: JSON, Markdown, one HTML page and a plot."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from eval.compare import Pair
from eval.measures import PLOTTED, shown
from eval.reports import plots
from eval.reports.html import html_of
from eval.reports.markdown import markdown_of
from eval.reports.report import Changes, Report
from eval.reports.sizes import size_plot
from index.files import InputError, atomic_path, write_json

log = logging.getLogger(__name__)


def write(folder: Path, report: Report) -> list[Path]:
    """Write report.json, report.md, report.html and, if matplotlib is installed, report.png, each atomically.

    Without matplotlib the page has no plots, and a warning is logged.

    Args:
        folder: the folder of the report.
        report: its content.

    Returns:
        The files written.

    Raises:
        InputError: the report has no sets, or no set has a system.
    """
    if not report.sets or not all(report_set.systems for report_set in report.sets):
        raise InputError(f"{folder}: expected at least one result to report, found none")
    paths = [folder / "report.json", folder / "report.md", folder / "report.html"]
    draw = plots.available()
    plotted = draw and plot(folder / "report.png", report)
    if plotted and report.sizes:
        with plots.style():
            plots.to_png(size_plot(report.sizes, report.measure), folder / "sizes.png")
    write_json(paths[0], json_of(report))
    for path, text in ((paths[1], markdown_of(report, plotted)), (paths[2], html_of(report, draw))):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    drawn = [folder / "report.png", *([folder / "sizes.png"] if report.sizes else [])]
    return [*paths, *drawn] if plotted else paths


def json_of(report: Report) -> dict[str, Any]:
    """The report as JSON. Values by query are omitted; they can be computed from the run files."""
    return {
        "title": report.title,
        "measure": report.measure,
        "details": dict(report.details),
        "sets": {
            report_set.name: {
                "queries": report_set.queries,
                "systems": {
                    name: {"mean": metrics.mean, "missing_queries": metrics.missing}
                    for name, metrics in report_set.systems.items()
                },
                "identical_ids_left_out": {
                    name: metrics.identical_ids_left_out for name, metrics in report_set.systems.items()
                },
                "comparisons": [_pair_json(pair) for pair in report_set.pairs],
                "changes": [_changes_json(changes) for changes in report_set.changes],
            }
            for report_set in report.sets
        },
        "absent": list(report.absent),
        **({"sizes": [result.as_json() for result in report.sizes]} if report.sizes else {}),
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    values = dataclasses.asdict(pair)
    test = values.pop("test")
    # JSON has no infinity; t is infinite if all queries differ by the same amount.
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
    """Draw the headline measures as bars to a PNG file; False, with a warning, if the systems share none of them."""
    known = [metrics.mean.keys() for report_set in report.sets for metrics in report_set.systems.values()]
    measures = shown(PLOTTED, set(known[0]).intersection(*known[1:]))
    if not measures:
        log.warning("no plot: no cut-off of nDCG and recall is common to all systems")
        return False
    with plots.style():
        plots.to_png(plots.bars({report_set.name: report_set.systems for report_set in report.sets}, measures), path)
    return True
