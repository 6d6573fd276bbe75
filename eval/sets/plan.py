"""The BEIR benchmark: definitions of its sets, finding them on disk, and the result table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.measures import measure_name
from eval.metrics import Metrics, PerQuery
from index.beir import is_beir_folder
from index.files import ArgumentError, InputError

FORUMS = (
    "android",
    "english",
    "gaming",
    "gis",
    "mathematica",
    "physics",
    "programmers",
    "stats",
    "tex",
    "unix",
    "webmasters",
    "wordpress",
)


@dataclass(frozen=True)
class SetDefinition:
    """A set as BEIR publishes it (https://github.com/beir-cellar/beir, table of available datasets)."""

    name: str
    """BEIR's name, used for the zip file and the folder in it."""
    title: str
    queries: int
    """Judged queries of the split that is reported."""
    passages: int
    """Size of the corpus; rounded for sets that are not public, as in BEIR's table."""
    md5: str | None = None
    """Checksum of the public zip file; None for sets that BEIR may not distribute."""
    split: str = "test"
    parts: tuple[str, ...] = ()
    """Subfolders that are sets themselves; the row of the table is their unweighted mean."""


BEIR = (
    SetDefinition("msmarco", "MS MARCO", 6980, 8841823, "444067daf65d982533ea17ebd59501e4", "dev"),
    SetDefinition("trec-covid", "TREC-COVID", 50, 171332, "ce62140cb23feb9becf6270d0d1fe6d1"),
    SetDefinition("nfcorpus", "NFCorpus", 323, 3633, "a89dba18a62ef92f7d323ec890a0d38d"),
    SetDefinition("bioasq", "BioASQ", 500, 14910000),
    SetDefinition("nq", "NQ", 3452, 2681468, "d4d3d2e48787a744b6f6e691ff534307"),
    SetDefinition("hotpotqa", "HotpotQA", 7405, 5233329, "f412724f78b0d91183a0e86805e16114"),
    SetDefinition("fiqa", "FiQA-2018", 648, 57638, "17918ed23cd04fb15047f73e6c3bd9d9"),
    SetDefinition("signal1m", "Signal-1M (RT)", 97, 2860000),
    SetDefinition("trec-news", "TREC-NEWS", 57, 595000),
    SetDefinition("robust04", "Robust04", 249, 528000),
    SetDefinition("arguana", "ArguAna", 1406, 8674, "8ad3e3c2a5867cdced806d6503f29b99"),
    SetDefinition("webis-touche2020", "Touché-2020", 49, 382545, "46f650ba5a527fc69e0a6521c5a23563"),
    SetDefinition("cqadupstack", "CQADupStack", 13145, 457199, "4e41456d7df8ee7760a7f866133bda78", parts=FORUMS),
    SetDefinition("quora", "Quora", 10000, 522931, "18fb154900ba42a600f84b839c173167"),
    SetDefinition("dbpedia-entity", "DBPedia", 400, 4635922, "c2a39eb420a3164af735795df012ac2c"),
    SetDefinition("scidocs", "SCIDOCS", 1000, 25657, "38121350fc3a4d2f48850f6aff52e4a9"),
    SetDefinition("fever", "FEVER", 6666, 5416568, "5a818580227bfb4b35bb6fa46d9b6c03"),
    SetDefinition("climate-fever", "Climate-FEVER", 1535, 5416593, "8b66f0a9126c521bae2bde127b4dc99d"),
    SetDefinition("scifact", "SciFact", 300, 5183, "5f7d1de60b170fc8027bb7898e2efca1"),
)
"""The 18 sets of BEIR (Thakur et al. 2021, arXiv:2104.08663) and MS MARCO, on which most models are trained."""

BY_NAME = {definition.name: definition for definition in BEIR}
WHOLE = "beir"


@dataclass(frozen=True)
class Task:
    """One BEIR folder to evaluate."""

    name: str
    """Folder in the report: the name of the set, or "cqadupstack/android" for a part."""
    folder: Path
    split: str
    row: str
    """The row of the result table to which the task belongs."""


@dataclass(frozen=True)
class Plan:
    """The requested sets: those that exist on disk, and the names of those that do not."""

    tasks: list[Task]
    absent: list[str]


def plan(data: Sequence[str | Path], home: Path | None = None, split: str | None = None) -> Plan:
    """Find the folders of the requested sets.

    Args:
        data: BEIR folders; folders that contain BEIR folders (one row each, but a single row for the forums of
            CQADupStack); names of BEIR sets, looked up in `home`; or "beir" for all sets, which may be missing.
        home: the folder that contains sets by name.
        split: the split of the qrels; by default the one that BEIR reports: dev for MS MARCO, test for the others.

    Raises:
        InputError: a folder or a named set does not exist or contains no set, or two sets have the same name.
    """
    tasks: list[Task] = []
    absent: list[str] = []
    for entry in data:
        folder = Path(entry)
        if str(entry) == WHOLE and not folder.is_dir():
            for definition in BEIR:
                inside_home = None if home is None else home / definition.name
                if inside_home is not None and inside_home.is_dir():
                    tasks += _tasks(inside_home, split)
                else:
                    absent.append(definition.name)
        elif str(entry) in BY_NAME and not folder.is_dir():
            if home is None or not (home / str(entry)).is_dir():
                where = "" if home is None else f" in {home}"
                raise InputError(f"{entry}: no such folder, and the set of that name is not{where or ' here'}")
            tasks += _tasks(home / str(entry), split)
        elif not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        else:
            tasks += _tasks(folder, split)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"expected data folders of different names, found {', '.join(names)}")
    return Plan(tasks, absent)


def _tasks(folder: Path, split: str | None) -> list[Task]:
    name = folder.resolve().name
    definition = BY_NAME.get(name)
    wanted = split or (definition.split if definition else "test")
    inner = [] if is_beir_folder(folder) else [path for path in sorted(folder.iterdir()) if is_beir_folder(path)]
    if not inner:
        return [Task(name, folder, wanted, name)]
    if definition is not None and definition.parts:
        lost = [part for part in definition.parts if part not in {path.name for path in inner}]
        if lost:
            raise InputError(f"{folder}: expected the {len(definition.parts)} sets of {name}, found no {lost[0]}")
        return [Task(f"{name}/{part}", folder / part, wanted, name) for part in definition.parts]
    return [task for path in inner for task in _tasks(path, split)]


def check_outside(out: Path, tasks: Sequence[Task]) -> None:
    """Check that the report would not be written into the folder of a set.

    Raises:
        InputError: it would; the message names the set.
    """
    for task in tasks:
        report = (out / task.name).resolve()
        if task.folder.resolve() in (report, *report.parents):
            raise ArgumentError(
                "out", f"expected a folder outside the sets, found {out}, which writes into {task.folder}"
            )


def rows_of_tasks(tasks: Sequence[Task], found: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """Row -> metrics, from the metrics of all tasks by name; rows with several parts get their unweighted mean."""
    parts: dict[str, dict[str, Metrics]] = {}
    for task in tasks:
        parts.setdefault(task.row, {})[task.name] = found[task.name]
    return {row: mean_of(own) if len(own) > 1 else next(iter(own.values())) for row, own in parts.items()}


def mean_of(parts: Mapping[str, Metrics]) -> Metrics:
    """The unweighted mean over sets, as BEIR defines it for CQADupStack; set sizes do not matter.

    `per_query` of the result contains the queries of all sets, named "part/query".
    """
    first = next(iter(parts.values()))
    measures = [measure for measure in first.mean if all(measure in metrics.mean for metrics in parts.values())]
    mean = {m: float(np.mean([metrics.mean[m] for metrics in parts.values()])) for m in measures}
    queries = [f"{name}/{query}" for name, metrics in parts.items() for query in metrics.per_query]
    values = [[row[measure] for measure in measures] for part in parts.values() for row in part.per_query.values()]
    missing = [f"{name}/{query}" for name, metrics in parts.items() for query in metrics.missing]
    left_out = sum(metrics.identical_ids_left_out for metrics in parts.values())
    depths = [metrics.depth for metrics in parts.values() if metrics.depth is not None]
    per_query = PerQuery(queries, measures, np.array(values).reshape(-1, len(measures)))
    return Metrics(mean, per_query, missing, left_out, max(depths) if len(depths) == len(parts) else None)


def suite_table(rows: Mapping[str, Metrics], absent: Sequence[str], measure: str = "ndcg@10") -> str:
    """A Markdown table of the requested sets in BEIR's order; missing sets read 'not here'.

    The last lines are the means of `lines_of_means` over the sets that were evaluated.
    """
    known = [definition.name for definition in BEIR if definition.name in rows or definition.name in absent]
    names = [*known, *(name for name in rows if name not in known)]
    lines = [f"| set | queries | {measure_name(measure)} |", "|---|---:|---:|"]
    for name in names:
        title = BY_NAME[name].title if name in BY_NAME else name
        if name in rows:
            lines.append(f"| {title} | {len(rows[name].per_query):,} | {rows[name].mean[measure]:.4f} |")
        else:
            why = "not here" if BY_NAME[name].md5 else "not here (not public)"
            lines.append(f"| {title} | {BY_NAME[name].queries:,} | {why} |")
    for title, counted in lines_of_means([name for name in names if name in rows]):
        mean = float(np.mean([rows[name].mean[measure] for name in counted]))
        lines.append(f"| {title} | | {mean:.4f} |")
    return "\n".join(lines) + "\n"


def lines_of_means(rows: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The means below a table of the sets `rows`, as (title, sets in the mean).

    BEIR's paper excludes MS MARCO, because models are trained on it; MTEB includes its dev split. If MS MARCO is among
    the sets, both means are given. A mean over a single set is omitted.
    """
    without = [name for name in rows if name != "msmarco"]
    lines = [(f"mean of {len(without)} sets", without)]
    if len(without) < len(rows):
        lines.append((f"mean of {len(rows)} sets, MS MARCO among them", list(rows)))
    return [(title, counted) for title, counted in lines if len(counted) > 1]
