"""Comparison of systems on BEIR sets in one report: run files, BM25, and fused runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bm25.runs import BM25, bm25_details, cached_bm25_run
from eval.bm25.search import import_bm25s
from eval.compare import Pair, changed_queries, compare, most_changed, passages_to_show, texts_of
from eval.fusion import RRF_K, fuse
from eval.metrics import KS, MEASURES, Metrics, evaluate_run
from eval.ranking import RankedRun
from eval.reports.files import write
from eval.reports.report import Changes, Report, ReportSet
from eval.reports.run_files import find_run, read_judged_run
from eval.runs import write_trec_run
from eval.sets.plan import Plan, check_outside, plan
from eval.significance import PERMUTATIONS
from index.beir import BeirDataset, beir_file
from index.files import ArgumentError, InputError, read_json, sha256_file
from index.progress import Reporter

# The default cut-offs, and more for the recall curves.
CUTS = tuple(sorted({*KS, 2, 20, 50, 200, 500}))
DEFAULT = "ndcg@10"


@dataclass(frozen=True)
class Fusion:
    """A fusion of systems of the same comparison."""

    parts: tuple[str, ...]
    """Names of at least two systems."""
    method: str = "rrf"
    weights: tuple[float, ...] = ()
    """One weight per part; empty: all 1."""

    @property
    def name(self) -> str:
        """The name of the fused system, such as "MiniLM+BM25 (rrf)"."""
        shares = f" {':'.join(f'{weight:g}' for weight in self.weights)}" if self.weights else ""
        return f"{'+'.join(self.parts)} ({self.method}{shares})"


@dataclass(frozen=True)
class Request:
    """What to compare, and how; see `compare_to_report`."""

    systems: Mapping[str, Path]
    """Name -> a TREC run file, or the folder of a report with SET/run.trec for each set."""
    data: Sequence[str | Path]
    """BEIR folders, folders that contain BEIR folders, or names of BEIR sets in `home`."""
    home: Path | None = None
    """Folder that contains sets by name."""
    split: str | None = None
    """Split of the qrels. None: dev for MS MARCO, test for all others."""
    title: str = ""
    """Title of the report; empty: the names of the sets."""
    dangling: bool = False
    """Continue if the qrels judge queries that do not exist; they count as 0."""
    keep_identical_ids: bool = False
    """Keep passages that have the id of their query."""
    bm25: bool = False
    """Whether to add BM25 as a system."""
    stopwords: str | None = "en"
    """Language of the stop words that BM25 removes (a name of bm25s); None removes none."""
    fusions: Sequence[Fusion] = ()
    measure: str | None = None
    """Measure of the comparison; None: nDCG@10. It may be deeper than a run, as in trec_eval."""
    baseline: str | None = None
    """System with which all others are compared; None: all pairs are compared."""
    k: int = 1000
    """Passages per query that are scored, and that BM25 and fused systems return."""
    permutations: int = PERMUTATIONS
    """Permutations of the randomization test."""
    seed: int = 0
    """Seed of the randomization test."""
    changed: int = 4
    """Number of most improved queries to show, and of most worsened ones."""


def named_systems(words: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=PATH, or PATH with the name of the file or folder as the name, to name -> path.

    Raises:
        InputError: a path does not exist, or two systems have the same name.
    """
    systems: dict[str, Path] = {}
    for word in words:
        name, separator, rest = word.partition("=")
        path = Path(rest) if separator and not Path(word).exists() else Path(word)
        if path == Path(word):
            name = path.resolve().name.removesuffix(".gz").removesuffix(".txt").removesuffix(".trec")
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if not name or name in systems or name == BM25:
            found = f"found {name!r} {'twice' if name in systems else ''}".strip()
            raise InputError(f"{word}: expected a different name for each system, as in NAME={path}; {found}")
        systems[name] = path
    return systems


def compare_to_report(request: Request, out: Path, reporter: Reporter, versions: Mapping[str, str]) -> Report:
    """Score every system on every set, compare the systems, and write the report into `out`.

    Writes OUT/report.json, report.md, report.html and report.png, and OUT/SET/NAME.trec for BM25 and fused systems.

    Args:
        request: what to compare.
        out: the folder of the report, outside the sets.
        reporter: shows progress.
        versions: package -> version, for the report.

    Returns:
        The report that was written.

    Raises:
        InputError: a file is missing or invalid, a run has other queries, or the request is invalid; the message then
            begins with the flag of `retriever evaluate compare`.
    """
    measure = request.measure or DEFAULT
    sets_plan = plan(request.data, request.home, request.split)
    _check_request(request, measure, sets_plan, out)
    datasets = [
        dataclasses.replace(BeirDataset.open(task.folder, task.split, dangling=request.dangling), name=task.name)
        for task in sets_plan.tasks
    ]
    if request.bm25:
        import_bm25s(request.stopwords)
    # All files are found before the first is read, because large runs take a while.
    files = {
        (name, dataset.name): find_run(path, dataset, len(datasets))
        for name, path in request.systems.items()
        for dataset in datasets
    }
    runs = {
        dataset.name: {
            name: read_judged_run(files[name, dataset.name], dataset, request.keep_identical_ids)
            for name in request.systems
        }
        for dataset in datasets
    }
    sets = []
    for task, dataset in zip(sets_plan.tasks, datasets, strict=True):
        report_set = _compare_on_set(request, dataset, runs[dataset.name], measure, out, reporter)
        sets.append(dataclasses.replace(report_set, row=task.row))
    splits = ", ".join(dict.fromkeys(task.split for task in sets_plan.tasks))
    title = request.title or f"{', '.join(dict.fromkeys(task.row for task in sets_plan.tasks))} ({splits})"
    details = {**_details(request, datasets, files, sets), "versions": dict(versions)}
    report = Report(title, sets, details, measure, sets_plan.absent)
    write(out, report)
    return report


def _check_request(request: Request, measure: str, sets_plan: Plan, out: Path) -> None:
    """Raise an InputError that names the flag if the request is invalid."""
    name, _, cut = measure.partition("@")
    if name not in MEASURES or cut not in map(str, CUTS):
        cuts = ", ".join(map(str, CUTS))
        raise ArgumentError("measure", f"expected one of {', '.join(MEASURES)} @ {cuts}, found {request.measure}")
    check_outside(out, sets_plan.tasks)
    if not sets_plan.tasks:
        raise ArgumentError(
            "data", f"expected at least one set that is on disk, found none of {', '.join(sets_plan.absent)}"
        )
    known = [*request.systems, *([BM25] if request.bm25 else [])]
    for fusion in request.fusions:
        unknown = [part for part in fusion.parts if part not in known]
        if unknown:
            raise ArgumentError("fuse", f"expected names among {', '.join(known)}, found {unknown[0]}")
    names = [*known, *(fusion.name for fusion in request.fusions)]
    if len(set(names)) < len(names):
        raise ArgumentError("fuse", f"expected each hybrid once, found {', '.join(names[len(known) :])}")
    if out.resolve() in {path.resolve() for path in request.systems.values()}:
        raise ArgumentError("out", f"expected another folder, found {out}, the report of a system")
    if request.baseline is not None and request.baseline not in names:
        raise ArgumentError("baseline", f"expected one of {', '.join(names)}, found {request.baseline}")


def _compare_on_set(
    request: Request,
    dataset: BeirDataset,
    given: Mapping[str, RankedRun],
    measure: str,
    out: Path,
    reporter: Reporter,
) -> ReportSet:
    """Compare all systems on one set, the runs `given` and those of BM25 and the fusions."""
    uncut = dict(given)
    if request.bm25:
        uncut[BM25] = cached_bm25_run(
            dataset,
            out / dataset.name,
            request.k,
            reporter,
            request.stopwords,
            keep_identical_ids=request.keep_identical_ids,
        )
    for fusion in request.fusions:
        # Runs are fused before they are cut, because a cut changes the fused scores.
        parts = [uncut[part] for part in fusion.parts]
        uncut[fusion.name] = fuse(parts, fusion.method, weights=fusion.weights or None, k=request.k)
        file = _file_name(fusion.name)
        write_trec_run(out / dataset.name / f"{file}.trec", uncut[fusion.name], file)
    runs = {name: run.cut(request.k) for name, run in uncut.items()}
    depths = sorted(run.depth for run in runs.values())
    depth = f"{depths[0]:,}" if depths[0] == depths[-1] else f"{depths[0]:,} to {depths[-1]:,}"
    reporter.line(f"{dataset.name}: {len(runs)} runs, {len(dataset.qrels):,} queries, {depth} passages a query")
    keep = request.keep_identical_ids
    systems = {name: evaluate_run(dataset.qrels, run, CUTS, drop_identical=not keep) for name, run in runs.items()}
    pairs = compare(systems, measure, baseline=request.baseline, permutations=request.permutations, seed=request.seed)
    changes = _changes(request, dataset, systems, runs, pairs, measure)
    return ReportSet(dataset.name, systems, pairs, changes, runs, dataset.qrels)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w+.-]+", "_", name).strip("_.") or "run"


def _changes(
    request: Request,
    dataset: BeirDataset,
    systems: Mapping[str, Metrics],
    runs: Mapping[str, RankedRun],
    pairs: Sequence[Pair],
    measure: str,
) -> list[Changes]:
    """The most changed queries of each system against the baseline, or against the first system."""
    baseline = request.baseline or next(iter(systems))
    shown = [pair for pair in pairs if pair.a == baseline]
    changed = [most_changed(systems[pair.a], systems[pair.b], measure, request.changed) for pair in shown]
    ids = {
        passage
        for pair, (better, worse) in zip(shown, changed, strict=True)
        for query in (*better, *worse)
        for passage, _, _ in passages_to_show(query, dataset.qrels, runs[pair.a], runs[pair.b])
    }
    texts = texts_of(dataset.passages(), ids) if ids else {}
    changes = []
    for pair, directions in zip(shown, changed, strict=True):
        both = (systems[pair.a], systems[pair.b]), (runs[pair.a], runs[pair.b])
        improved, worsened = (
            changed_queries(queries, dataset.queries, dataset.qrels, *both, measure, texts) for queries in directions
        )
        changes.append(Changes(pair, improved, worsened))
    return changes


def _details(
    request: Request,
    datasets: Sequence[BeirDataset],
    files: Mapping[tuple[str, str], Path],
    sets: Sequence[ReportSet],
) -> dict[str, Any]:
    """What is needed to reproduce the comparison."""
    details: dict[str, Any] = {}
    for name, path in request.systems.items():
        runs = {f"run {data.name} sha256": sha256_file(files[name, data.name]) for data in datasets}
        details[name] = {"from": str(path), **_details_of_report(path), **runs}
    if request.bm25:
        details[BM25] = bm25_details(request.stopwords)
    for fusion in request.fusions:
        details[fusion.name] = f"{fusion.method}, k {RRF_K}" if fusion.method == "rrf" else fusion.method
    for data, report_set in zip(datasets, sets, strict=True):
        names = ("corpus.jsonl", "queries.jsonl", f"qrels/{data.split}.tsv")
        details[f"data {data.name}"] = {
            "split": data.split,
            "passages a query": {name: run.depth for name, run in report_set.runs.items()},
            **{f"{name} sha256": sha256_file(beir_file(data.folder, name)) for name in names},
        }
    details["identical ids"] = "kept" if request.keep_identical_ids else "left out where not judged"
    details["tests"] = (
        f"paired by query, two-sided; randomization with {request.permutations:,} permutations, seed {request.seed}; "
        f"Holm over {'all pairs' if request.baseline is None else f'the pairs with {request.baseline}'} of a set"
    )
    return details


def _details_of_report(path: Path) -> dict[str, Any]:
    """The details in the report of a model, if there are any."""
    report = path / "report.json"
    if not report.is_file():
        return {}
    values = read_json(report)
    details = values.get("details") if isinstance(values, dict) else None
    return dict(details) if isinstance(details, dict) else {}
