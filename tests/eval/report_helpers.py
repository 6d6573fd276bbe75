"""Example reports for tests."""

from __future__ import annotations

import random

from eval.compare import ChangedQuery, ShownPassage, compare
from eval.metrics import Metrics, Qrels, Run, evaluate_run
from eval.ranking import RankedRun
from eval.reports.report import Changes, Report, ReportSet

QRELS: Qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"a": 1}}
BEFORE: Run = {"q1": {"b": 2.0, "a": 1.0}, "q2": {"b": 1.0}}
AFTER: Run = {"q1": {"a": 1.0}, "q2": {"b": 1.0, "a": 0.5}, "q3": {"a": 1.0}}


def rows() -> dict[str, Metrics]:
    """Two systems on three queries; the first has results for two of them."""
    return {"before": evaluate_run(QRELS, BEFORE), "after": evaluate_run(QRELS, AFTER)}


def whole_report() -> Report:
    """A report with two sets, all optional parts, and names that need escaping."""
    systems = {"<b>before</b> $x$": rows()["before"], "after & co|": rows()["after"]}
    runs = {name: RankedRun.of(run) for name, run in zip(systems, (BEFORE, AFTER), strict=True)}
    pairs = compare(systems)
    hostile = "<script>alert(1)</script> [x](javascript:y) \"quoted\" 'q' &amp; |\n# heading"
    changed = ChangedQuery("q<1>", hostile, 0.6309, 1.0, [ShownPassage("p<i>", hostile, 1, None, 1)])
    changes = [Changes(pairs[0], [changed], [])]
    sets = [
        ReportSet("one <&> \"'", systems, pairs, changes, runs, QRELS),
        ReportSet("two", {"after & co|": rows()["after"]}),
    ]
    details = {"model sha256": "0" * 64, "systems": {"before": {"seed": 3, "list": [1, "</dd>"]}}}
    return Report("toy <title>", sets, details, absent=["robust04"])


def large_set(queries: int = 3000) -> ReportSet:
    """A set with so many distinct values that the scatter plot is rasterized."""
    generator = random.Random(0)
    qrels: Qrels = {
        f"q{q}": {f"d{generator.randrange(40)}": generator.randint(1, 3) for _ in range(6)} for q in range(queries)
    }
    runs = {
        name: RankedRun.of({q: {f"d{d}": generator.random() for d in range(40)} for q in qrels})
        for name in ("a system with a rather long name of its own", "another system whose name is long as well")
    }
    systems = {name: evaluate_run(qrels, run) for name, run in runs.items()}
    pairs = compare(systems, permutations=200)
    return ReportSet("large", systems, pairs, [Changes(pairs[0], [], [])], runs, qrels)
