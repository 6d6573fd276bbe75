"""Results of an evaluation on several sets, and how they are written: evaluation.json and the report."""

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
from eval.reports.mteb_files import write_mteb_file
from eval.reports.report import Report, ReportSet
from eval.reports.run_files import RUNS
from eval.sets.plan import Task
from eval.sizes import SizeResult
from index.beir import BeirDataset, beir_file
from index.files import sha256_file, write_json
from index.store.reader import EmbeddingStore


@dataclass
class SetResult:
    """The result on one set."""

    run: RankedRun
    metrics: Metrics
    qrels: Qrels
    data: dict[str, str]
    """sha256 of the files of the set."""
    approximation: Approximation | None = None
    by_dim: dict[int, Metrics] = field(default_factory=dict)
    by_precision: dict[tuple[int, str], Metrics] = field(default_factory=dict)
    """(dimensions, precision) -> metrics of embeddings in fewer bits."""
    """Dimension -> metrics with embeddings truncated to it."""
    index: dict[str, Any] = field(default_factory=dict)
    """How the index was built and how it is searched."""
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    """sha256 of the run files."""


@dataclass
class SuiteResult:
    """The results on all sets."""

    rows: dict[str, Metrics]
    """Row of the result table -> metrics; the forums of CQADupStack share a row."""
    absent: list[str]
    """Requested sets that do not exist on disk."""
    exact: dict[str, Metrics]
    """Set -> metrics of exact search; each forum of CQADupStack is a set."""
    approximations: dict[str, Approximation]
    """Set -> results of the index, if one was requested."""
    sizes: list[SizeResult] = field(default_factory=list)
    """Results by size of the embeddings, if they were requested."""

    @property
    def measure(self) -> str:
        """The main measure: nDCG at 10, or at the deepest cut-off if the run is shallower."""
        return shown(["ndcg@10"], next(iter(self.rows.values())).mean.keys())[0]

    def as_json(self) -> dict[str, Any]:
        """The means by row, the missing sets, and the losses of the index by set, for JSON."""
        indexes = {name: result.as_json(self.exact[name]) for name, result in self.approximations.items()}
        return {
            "sets": {
                row: {
                    "mean": metrics.mean,
                    "missing_queries": metrics.missing,
                    "identical_ids_left_out": metrics.identical_ids_left_out,
                }
                for row, metrics in self.rows.items()
            },
            "absent": self.absent,
            **({"index": indexes} if indexes else {}),
            **({"sizes": [result.as_json() for result in self.sizes]} if self.sizes else {}),
        }


def data_checksums(dataset: BeirDataset, store: EmbeddingStore) -> dict[str, str]:
    """sha256 of the files of a set; that of the corpus was computed when it was encoded."""
    return {
        "corpus sha256": store.source["sha256"],
        "queries sha256": sha256_file(beir_file(dataset.folder, "queries.jsonl")),
        "qrels sha256": sha256_file(dataset.qrels_file),
    }


def write_suite(
    out: Path,
    tasks: Sequence[Task],
    summary: SuiteResult,
    results: Mapping[str, SetResult],
    details: Mapping[str, Any],
    checked: Mapping[str, Any],
) -> None:
    """Write OUT/evaluation.json, OUT/report.* and OUT/mteb/*.json.

    Args:
        out: the folder of the report.
        tasks: the evaluated sets.
        summary: the results on all sets.
        results: task name -> result.
        details: "model", "versions", and how all sets were evaluated.
        checked: task name -> result of the validation of the set.
    """
    indexes = {name: result.index for name, result in results.items() if result.index}
    splits = ", ".join(dict.fromkeys(task.split for task in tasks))
    details = {
        **details,
        "split": splits,
        "data": {name: result.data for name, result in results.items()},
        **({"index": indexes} if indexes else {}),
        "seed": "of the index; nothing else is random" if indexes else "none: nothing is drawn at random",
    }
    sets_json = {name: _set_json(result, checked.get(name, {})) for name, result in results.items()}
    write_json(out / "evaluation.json", {"details": details, "absent": summary.absent, "sets": sets_json})
    system = Path(str(details["model"])).name
    sets = [_report_set(row, metrics, results.get(row), system) for row, metrics in summary.rows.items()]
    title = f"{', '.join(summary.rows)} ({splits})"
    write(out, Report(title, sets, details, summary.measure, summary.absent, summary.sizes))
    for task in tasks:
        found = results[task.name]
        write_mteb_file(out, task.name, task.split, found.metrics, found.data, sum(found.seconds.values()))


def _report_set(row: str, metrics: Metrics, result: SetResult | None, system: str) -> ReportSet:
    """A row of the report, with its run unless the row is the mean of several sets."""
    if result is None:
        return ReportSet(row, {system: metrics})
    systems = {system: metrics}
    if result.approximation is not None:
        systems[f"{system}, {result.approximation.index}"] = result.approximation.metrics
    return ReportSet(row, systems, runs={system: result.run}, qrels=result.qrels)


def _set_json(result: SetResult, checked: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "mean": result.metrics.mean,
        "queries": len(result.metrics.per_query),
        "missing_queries": result.metrics.missing,
        "identical_ids_left_out": result.metrics.identical_ids_left_out,
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        RUNS: result.runs,
        "preflight": dict(checked),
    }
    if result.by_dim:
        values["by dimension"] = {str(dim): metrics.mean for dim, metrics in result.by_dim.items()}
    if result.by_precision:
        values["by precision"] = {f"{dim} {name}": found.mean for (dim, name), found in result.by_precision.items()}
    if result.approximation is not None:
        values["index"] = result.approximation.as_json(result.metrics)
    return values
