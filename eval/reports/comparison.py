"""Runs side by side: those of models, of other programs, BM25's and fused ones, on BEIR folders, to one report."""

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
from eval.ranking import RankedRun, without_identical_ids
from eval.reports.files import write
from eval.reports.report import Changes, Report, ReportSet
from eval.reports.run_hashes import check_run
from eval.runs import read_trec_run, write_trec_run
from eval.sets.plan import check_outside, plan
from eval.significance import PERMUTATIONS
from index.beir import BeirDataset, beir_file
from index.files import InputError, read_json, sha256_file
from index.progress import Reporter

# Between the usual cut-offs, for the curves.
CUTS = tuple(sorted({*KS, 2, 20, 50, 200, 500}))
DEFAULT = "ndcg@10"


@dataclass(frozen=True)
class Fusion:
    """A hybrid of systems of the same table."""

    parts: tuple[str, ...]
    """Names of at least two."""
    method: str = "rrf"
    weights: tuple[float, ...] = ()
    """One a part; none: all 1."""

    @property
    def name(self) -> str:
        """How the row is called: "MiniLM+BM25 (rrf)"."""
        shares = f" {':'.join(f'{weight:g}' for weight in self.weights)}" if self.weights else ""
        return f"{'+'.join(self.parts)} ({self.method}{shares})"


@dataclass(frozen=True)
class Request:
    """What to compare, and how."""

    systems: Mapping[str, Path]
    """Name -> a TREC run file, or the folder of a report with DATA/run.trec for each data set."""
    data: Sequence[str | Path]
    """BEIR folders, folders of them, or names of BEIR's sets below `home`."""
    home: Path | None = None
    split: str | None = None
    """None: test, and dev of MS MARCO."""
    title: str = ""
    dangling: bool = False
    """Go on where qrels judge queries that are not there; they count as 0."""
    keep_identical_ids: bool = False
    """Leave no passage out of a run for having its query's id."""
    bm25: bool = False
    stopwords: str | None = "en"
    """Language whose stop words BM25 drops, as bm25s names it."""
    fusions: Sequence[Fusion] = ()
    measure: str | None = None
    """None: nDCG@10. It may be deeper than a run, which then has nothing more to add, as in trec_eval."""
    baseline: str | None = None
    k: int = 1000
    """Passages a query that are scored, that a hybrid returns, and that BM25 finds."""
    permutations: int = PERMUTATIONS
    seed: int = 0
    changed: int = 4
    """Queries shown that one system does better, and as many that it does worse."""


def named_systems(words: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH, or PATH for the name of the file or folder, as name -> path.

    Raises:
        InputError: a path is not there, or two systems have the same name.
    """
    systems: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        path = Path(rest) if equals and not Path(word).exists() else Path(word)
        if path == Path(word):
            name = path.resolve().name.removesuffix(".gz").removesuffix(".txt").removesuffix(".trec")
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if not name or name in systems or name == BM25:
            found = f"found {name!r} {'twice' if name in systems else ''}".strip()
            raise InputError(f"{word}: expected a name of its own for each system, as in NAME={path}; {found}")
        systems[name] = path
    return systems


def compare_to_report(request: Request, out: Path, reporter: Reporter, versions: Mapping[str, str]) -> Report:
    """Score every system on every set, test them against each other, and write the report into `out`.

    OUT/report.json, report.md, report.html, report.png, and OUT/DATA/NAME.trec for the runs that were made here.

    Raises:
        InputError: a file is missing or broken, a run is of other queries, or there is nothing to compare by.
    """
    measure = request.measure or DEFAULT
    name, _, cut = measure.partition("@")
    if name not in MEASURES or cut not in map(str, CUTS):
        cuts = ", ".join(map(str, CUTS))
        raise InputError(f"--measure: expected one of {', '.join(MEASURES)} @ {cuts}, found {request.measure}")
    here = plan(request.data, request.home, request.split)
    check_outside(out, here.tasks)
    datasets = [
        dataclasses.replace(BeirDataset.open(task.folder, task.split, dangling=request.dangling), name=task.name)
        for task in here.tasks
    ]
    if not datasets:
        raise InputError(f"--data: expected at least one set that is here, found none of {', '.join(here.absent)}")
    known = [*request.systems, *([BM25] if request.bm25 else [])]
    for fusion in request.fusions:
        lost = [part for part in fusion.parts if part not in known]
        if lost:
            raise InputError(f"--fuse: expected names among {', '.join(known)}, found {lost[0]}")
    everything = [*known, *(fusion.name for fusion in request.fusions)]
    if len(set(everything)) < len(everything):
        raise InputError(f"--fuse: expected each hybrid once, found {', '.join(everything[len(known) :])}")
    if out.resolve() in {path.resolve() for path in request.systems.values()}:
        raise InputError(f"--out: expected a folder of its own, found {out}, the report of a system")
    if request.baseline is not None and request.baseline not in everything:
        raise InputError(f"--baseline: expected one of {', '.join(everything)}, found {request.baseline}")
    if request.bm25:
        import_bm25s(request.stopwords)
    # Before any of them is read, because the large ones take a while.
    files = {
        (name, dataset.name): run_file(path, dataset, len(datasets))
        for name, path in request.systems.items()
        for dataset in datasets
    }
    runs = {
        dataset.name: {
            name: _judged_run(files[name, dataset.name], dataset, request.keep_identical_ids)
            for name in request.systems
        }
        for dataset in datasets
    }
    sets = []
    for task, dataset in zip(here.tasks, datasets, strict=True):
        found = _set(request, dataset, runs[dataset.name], measure, out, reporter)
        sets.append(dataclasses.replace(found, row=task.row))
    splits = ", ".join(dict.fromkeys(task.split for task in here.tasks))
    title = request.title or f"{', '.join(dict.fromkeys(task.row for task in here.tasks))} ({splits})"
    details = {**_details(request, datasets, files, sets), "versions": dict(versions)}
    report = Report(title, sets, details, measure, here.absent)
    write(out, report)
    return report


def run_file(path: Path, dataset: BeirDataset, datasets: int) -> Path:
    """The run of a system on a data set.

    Raises:
        InputError: a report's folder has none for this set or a damaged one, or one file is given for several sets.
    """
    if path.is_dir():
        for place in (path / dataset.name / "run.trec", path / "run.trec"):
            if place.is_file() and (datasets == 1 or place.parent != path):
                check_run(path, dataset.name, place)
                return place
        raise InputError(
            f"{path}: expected {dataset.name}/run.trec, as `retriever evaluate beir` writes it, found none"
        )
    if datasets > 1:
        raise InputError(
            f"{path}: expected one data folder for a run file, found {datasets}; or a folder of DATA/run.trec"
        )
    return path


def _set(
    request: Request,
    dataset: BeirDataset,
    given: Mapping[str, RankedRun],
    measure: str,
    out: Path,
    reporter: Reporter,
) -> ReportSet:
    """All systems on one set, each by itself: what a run scores does not depend on the other runs."""
    whole = dict(given)
    if request.bm25:
        whole[BM25] = cached_bm25_run(
            dataset,
            out / dataset.name,
            request.k,
            reporter,
            request.stopwords,
            keep_identical_ids=request.keep_identical_ids,
        )
    for fusion in request.fusions:
        # Of whole runs: where one is cut, the others' passages get another score.
        parts = [whole[part] for part in fusion.parts]
        whole[fusion.name] = fuse(parts, fusion.method, weights=fusion.weights or None, k=request.k)
        file = _file_name(fusion.name)
        write_trec_run(out / dataset.name / f"{file}.trec", whole[fusion.name], file)
    runs = {name: run.cut(request.k) for name, run in whole.items()}
    depths = sorted(run.depth for run in runs.values())
    depth = f"{depths[0]:,}" if depths[0] == depths[-1] else f"{depths[0]:,} to {depths[-1]:,}"
    reporter.line(f"{dataset.name}: {len(runs)} runs, {len(dataset.qrels):,} queries, {depth} passages a query")
    keep = request.keep_identical_ids
    systems = {name: evaluate_run(dataset.qrels, run, CUTS, drop_identical=not keep) for name, run in runs.items()}
    pairs = compare(systems, measure, baseline=request.baseline, permutations=request.permutations, seed=request.seed)
    changes = _changes(request, dataset, systems, runs, pairs, measure)
    return ReportSet(dataset.name, systems, pairs, changes, runs, dataset.qrels)


def _judged_run(path: Path, dataset: BeirDataset, keep_identical_ids: bool) -> RankedRun:
    """The run's judged queries, without what has its query's id and is not judged for it, unless that is kept."""
    run = read_trec_run(path)
    places = [place for query in dataset.qrels if (place := run.position(query)) is not None]
    if not places:
        first = next(iter(run.queries), "none at all")
        raise InputError(f"{path}: expected queries of {dataset.folder}, split {dataset.split}, found {first}")
    queries = [run.queries[place] for place in places]
    judged = RankedRun(queries, run.passages, run.rows[places], run.scores[places])
    return judged if keep_identical_ids else without_identical_ids(judged, dataset.qrels)


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
    """Of each system against the baseline, or against the first."""
    first = request.baseline or next(iter(systems))
    shown = [pair for pair in pairs if pair.a == first]
    wanted = [most_changed(systems[pair.a], systems[pair.b], measure, request.changed) for pair in shown]
    ids = {
        passage
        for pair, found in zip(shown, wanted, strict=True)
        for query in (*found[0], *found[1])
        for passage, _, _ in passages_to_show(query, dataset.qrels, runs[pair.a], runs[pair.b])
    }
    texts = texts_of(dataset.passages(), ids) if ids else {}
    changes = []
    for pair, found in zip(shown, wanted, strict=True):
        both = (systems[pair.a], systems[pair.b]), (runs[pair.a], runs[pair.b])
        better, worse = (
            changed_queries(queries, dataset.queries, dataset.qrels, *both, measure, texts) for queries in found
        )
        changes.append(Changes(pair, better, worse))
    return changes


def _details(
    request: Request,
    datasets: Sequence[BeirDataset],
    files: Mapping[tuple[str, str], Path],
    sets: Sequence[ReportSet],
) -> dict[str, Any]:
    """What is needed to do it again."""
    details: dict[str, Any] = {}
    for name, path in request.systems.items():
        runs = {f"run {data.name} sha256": sha256_file(files[name, data.name]) for data in datasets}
        details[name] = {"from": str(path), **_details_of_report(path), **runs}
    if request.bm25:
        details[BM25] = bm25_details(request.stopwords)
    for fusion in request.fusions:
        details[fusion.name] = f"{fusion.method}, k {RRF_K}" if fusion.method == "rrf" else fusion.method
    for data, found in zip(datasets, sets, strict=True):
        names = ("corpus.jsonl", "queries.jsonl", f"qrels/{data.split}.tsv")
        details[f"data {data.name}"] = {
            "split": data.split,
            "passages a query": {name: run.depth for name, run in found.runs.items()},
            **{f"{name} sha256": sha256_file(beir_file(data.folder, name)) for name in names},
        }
    details["identical ids"] = "kept" if request.keep_identical_ids else "left out where not judged"
    details["tests"] = (
        f"paired by query, two-sided; randomisation with {request.permutations:,} sign patterns, seed {request.seed}; "
        f"Holm over {'all pairs' if request.baseline is None else f'the pairs with {request.baseline}'} of a set"
    )
    return details


def _details_of_report(path: Path) -> dict[str, Any]:
    """How a model's report says that its numbers came to be."""
    report = path / "report.json"
    if not report.is_file():
        return {}
    values = read_json(report)
    found = values.get("details") if isinstance(values, dict) else None
    return dict(found) if isinstance(found, dict) else {}
