"""What an evaluation of a model on many sets found, and how it is written: evaluation.json and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.approximate import Approximation
from eval.measures import shown
from eval.metrics import Metrics, Qrels
from eval.ranking import RankedRun
from eval.reports.files import write
from eval.reports.report import Report, ReportSet
from eval.reports.run_hashes import RUNS
from eval.sets.plan import Task
from index.beir import BeirDataset, beir_file
from index.files import sha256_file, write_json
from index.store.reader import EmbeddingStore


@dataclass
class SetResult:
    """What was found on one set."""

    run: RankedRun
    metrics: Metrics
    qrels: Qrels
    data: dict[str, str]
    """sha256 of the set's files."""
    approximation: Approximation | None = None
    index: dict[str, Any] = field(default_factory=dict)
    """How that index was made and searches."""
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    """sha256 of the run files."""


@dataclass
class SuiteResult:
    """What was found on all of them, by the rows of the table."""

    rows: dict[str, Metrics]
    absent: list[str]
    exact: dict[str, Metrics]
    """By set: the rows, but each forum of CQADupStack for itself."""
    approximations: dict[str, Approximation]
    """By set, where an index was asked for."""

    @property
    def measure(self) -> str:
        """nDCG@10, or at the deepest cut-off of a run that is not that deep."""
        return shown(["ndcg@10"], next(iter(self.rows.values())).mean.keys())[0]

    def as_json(self) -> dict[str, Any]:
        """For programs: the means by row, what was asked for and is not here, and by set what the index loses."""
        indexes = {name: other.as_json(self.exact[name]) for name, other in self.approximations.items()}
        return {
            "sets": {
                row: {
                    "mean": found.mean,
                    "missing_queries": found.missing,
                    "identical_ids_left_out": found.identical_ids_left_out,
                }
                for row, found in self.rows.items()
            },
            "absent": self.absent,
            **({"index": indexes} if indexes else {}),
        }


def sums(dataset: BeirDataset, store: EmbeddingStore) -> dict[str, str]:
    """sha256 of a set's files; the corpus's is known from when it was embedded."""
    return {
        "corpus sha256": store.source["sha256"],
        "queries sha256": sha256_file(beir_file(dataset.folder, "queries.jsonl")),
        "qrels sha256": sha256_file(dataset.qrels_file),
    }


def write_suite(
    out: Path,
    tasks: Sequence[Task],
    whole: SuiteResult,
    results: Mapping[str, SetResult],
    details: Mapping[str, Any],
    checked: Mapping[str, Any],
) -> None:
    """Write OUT/evaluation.json and OUT/report.*.

    Args:
        tasks: what was evaluated.
        results: by the names of the tasks.
        details: "model", "versions", and how all sets were evaluated.
        checked: by the names of the tasks, what the check of the sets found.
    """
    indexes = {name: result.index for name, result in results.items() if result.index}
    splits = ", ".join(dict.fromkeys(task.split for task in tasks))
    how = {
        **details,
        "split": splits,
        "data": {name: result.data for name, result in results.items()},
        **({"index": indexes} if indexes else {}),
        "seed": "that of the index; nothing else is drawn at random" if indexes else "none: nothing is drawn at random",
    }
    found = {name: _set_json(result, checked.get(name, {})) for name, result in results.items()}
    write_json(out / "evaluation.json", {"details": how, "absent": whole.absent, "sets": found})
    system = Path(str(details["model"])).name
    sets = [_report_set(row, metrics, results.get(row), system) for row, metrics in whole.rows.items()]
    write(out, Report(f"{', '.join(whole.rows)} ({splits})", sets, how, whole.measure, whole.absent))


def _report_set(row: str, metrics: Metrics, result: SetResult | None, system: str) -> ReportSet:
    """A row of the report; with its run, unless it is the mean of several sets."""
    if result is None:
        return ReportSet(row, {system: metrics})
    systems = {system: metrics}
    if result.approximation is not None:
        systems[f"{system}, {result.approximation.index}"] = result.approximation.metrics
    return ReportSet(row, systems, runs={system: result.run}, qrels=result.qrels)


def _set_json(result: SetResult, checked: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mean": result.metrics.mean,
        "queries": len(result.metrics.per_query),
        "missing_queries": result.metrics.missing,
        "identical_ids_left_out": result.metrics.identical_ids_left_out,
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        RUNS: result.runs,
        "preflight": dict(checked),
    }
    if other := result.approximation:
        found["index"] = other.as_json(result.metrics)
    return found
