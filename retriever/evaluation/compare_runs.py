"""The public function `retriever.compare`, which compares runs of several systems query by query on BEIR sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from eval.fusion import WEIGHTS, are_weights
from eval.reports.comparison import Fusion, Request, compare_to_report, named_systems
from eval.reports.report import Report
from eval.significance import PERMUTATIONS
from index.files import InputError
from index.progress import Progress, as_reporter
from retriever.errors import ArgumentError, ConfigError, check_at_least, check_choice, check_paths, path_list
from retriever.evaluation.report_folder import ReportFolder
from retriever.utils.versions import versions

Method = Literal["rrf", "minmax", "zscore"]


@dataclass(frozen=True)
class Comparison:
    """What `retriever.compare` returns.

    Attributes:
        folder: Folder of the report; temporary if no `out` was given.
        report: Metrics, significance tests and changed queries, in the form that reports are written from.
    """

    folder: ReportFolder
    report: Report

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Set -> system -> measure -> mean over the judged queries."""
        return {
            one.name: {system: dict(found.mean) for system, found in one.systems.items()} for one in self.report.sets
        }

    def save(self, folder: str | Path) -> Path:
        """Copy the report to a new or empty folder; returns it."""
        return self.folder.save(folder)

    def __repr__(self) -> str:
        measure = self.report.measure
        rows = {
            name: {system: round(found.get(measure, float("nan")), 4) for system, found in systems.items()}
            for name, systems in self.metrics.items()
        }
        return f"Comparison({measure}, {rows})"


def compare(
    systems: Mapping[str, str | Path] | str | Path | Sequence[str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    home: str | Path | None = None,
    split: str | None = None,
    title: str = "",
    allow_dangling: bool = False,
    keep_identical_ids: bool = False,
    bm25: bool = False,
    bm25_stopwords: str | None = "en",
    fuse: str | Sequence[str] = (),
    method: Method = "rrf",
    weights: Sequence[float] = (),
    measure: str | None = None,
    baseline: str | None = None,
    k: int = 1000,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    changed: int = 4,
    progress: Progress = None,
) -> Comparison:
    """Compare runs query by query on BEIR sets, with paired significance tests.

    Args:
        systems: Name -> TREC run file or folder of a report of `retriever.evaluate`; or a list of them, each as PATH or
            "NAME=PATH".
        data: BEIR folders, folders of them, names of BEIR's sets, or "beir" for all of them; one or more.
        out: Folder of the report. Default: None, a temporary folder, from which `Comparison.save` copies the report.
        home: Folder of the sets that `data` names. Default: None, the working directory.
        split: Split of the qrels. Default: None, "test", and "dev" for MS MARCO.
        title: Title of the report. Default: the names of the sets.
        allow_dangling: Whether to accept qrels with queries that do not exist (score 0). Default: False.
        keep_identical_ids: Whether to rank passages that have their query's id and are not judged for it. Default:
            False.
        bm25: Whether to add BM25 over the same corpus. Default: False.
        bm25_stopwords: Language of BM25's stop words, as bm25s names it, or None. Default: "en".
        fuse: Hybrids to add: names joined by +, for example "MiniLM+BM25".
        method: Fusion of the hybrids: "rrf" by reciprocal ranks, "minmax" or "zscore" by normalized scores. Default:
            "rrf".
        weights: Weights of a hybrid's parts. Default: equal.
        measure: Measure of the comparison, as "NAME@CUTOFF": ndcg, map, recall, precision, mrr, rcap or success, at a
            cut-off from 1 to 1000. Default: "ndcg@10".
        baseline: Test all other systems against this one only. Default: None, every pair is tested.
        k: Passages per query that are scored. Default: 1000.
        permutations: Number of random sign patterns of the randomization test. Default: 100,000.
        seed: Seed of the randomization test. Default: 0.
        changed: Number of queries to show on which a system is better, and on which it is worse. Default: 4.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The metrics and tests of all systems on all sets, and the report.

    Raises:
        InputError: A file cannot be read, or a run is of other queries.
        ConfigError: An argument is invalid.
    """
    sets = path_list("data", data)
    if not isinstance(systems, Mapping):
        systems = [] if systems is None else path_list("systems", systems)
    fuse = [fuse] if isinstance(fuse, str) else list(fuse)
    if not fuse and (weights or method != "rrf"):
        raise ArgumentError("weights" if weights else "method", "expected together with fuse")
    if not bm25 and bm25_stopwords != "en":
        raise ArgumentError("bm25_stopwords", "expected together with bm25")
    check_at_least(1, k=k, permutations=permutations)
    check_at_least(0, seed=seed, changed=changed)
    check_choice(get_args(Method), method=method)
    if not sets:
        raise ArgumentError("data", "expected at least one BEIR folder, found none")
    if not systems and not bm25:
        raise ConfigError("systems: expected at least one report or run file, or BM25, found none")
    request = Request(
        systems=_named(systems),
        data=sets,
        home=None if home is None else Path(home),
        split=split,
        title=title,
        dangling=allow_dangling,
        keep_identical_ids=keep_identical_ids,
        bm25=bm25,
        stopwords=bm25_stopwords,
        fusions=_fusions(fuse, method, weights),
        measure=measure,
        baseline=baseline,
        k=k,
        permutations=permutations,
        seed=seed,
        changed=changed,
    )
    folder = ReportFolder(out)
    return Comparison(
        folder, compare_to_report(request, folder.path, as_reporter(progress), versions("numpy", "scipy"))
    )


def _named(systems: Mapping[str, str | Path] | list[str | Path]) -> dict[str, Path]:
    if not isinstance(systems, Mapping):
        return named_systems([str(system) for system in systems])
    for name, path in systems.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError("systems", f"expected names that are text, found {name!r:.60}")
        check_paths(systems=path)
    named = {name: Path(path) for name, path in systems.items()}
    for path in named.values():
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    return named


def _fusions(fuse: Sequence[str], method: str, weights: Sequence[float]) -> list[Fusion]:
    for names in fuse:
        parts = names.split("+")
        if len(parts) < 2 or not all(parts):
            raise ArgumentError("fuse", f"expected names joined by +, found {names!r}")
        if weights and len(weights) != len(parts):
            raise ArgumentError("weights", f"expected {len(parts)} for {names}, found {len(weights)}")
    if weights and not are_weights(weights):
        raise ArgumentError("weights", f"expected {WEIGHTS}, found {' '.join(map(str, weights))}")
    return [Fusion(tuple(names.split("+")), method, tuple(weights)) for names in fuse]
