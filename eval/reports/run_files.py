"""Run files of a comparison: found by system and set, verified, and read."""

from __future__ import annotations

from pathlib import Path

from eval.ranking import RankedRun, without_identical_ids
from eval.runs import read_trec_run
from index.beir import BeirDataset
from index.files import InputError, read_json, sha256_file

EVALUATION = "evaluation.json"
RUNS = "runs sha256"
"""Key in the entry of a set in evaluation.json: file name -> sha256."""


def find_run(path: Path, dataset: BeirDataset, datasets: int) -> Path:
    """Find the run file of a system on a set.

    Args:
        path: a run file, or the folder of a report.
        dataset: the set.
        datasets: number of compared sets; with several, `path` must be the folder of a report.

    Raises:
        InputError: the folder has no run for this set or a damaged one, or one file is given for several sets.
    """
    if path.is_dir():
        for file in (path / dataset.name / "run.trec", path / "run.trec"):
            if file.is_file() and (datasets == 1 or file.parent != path):
                check_run(path, dataset.name, file)
                return file
        raise InputError(
            f"{path}: expected {dataset.name}/run.trec, as `retriever evaluate beir` writes it, found none"
        )
    if datasets > 1:
        raise InputError(
            f"{path}: expected one data folder for a run file, found {datasets}; for several, give a folder that "
            "contains SET/run.trec for each"
        )
    return path


def check_run(report: Path, dataset: str, run: Path) -> None:
    """Check a run in a folder that `retriever evaluate beir` wrote against the checksum in evaluation.json.

    A folder without evaluation.json, and a run without a checksum in it, are accepted.

    Args:
        report: the folder.
        dataset: the name of the set.
        run: the run file.

    Raises:
        InputError: the checksum differs, or evaluation.json cannot be read.
    """
    if not (report / EVALUATION).is_file():
        return
    value = read_json(report / EVALUATION)
    for key in ("sets", dataset, RUNS, run.name):
        value = value.get(key) if isinstance(value, dict) else None
    # Reports of older versions have no checksums.
    if isinstance(value, str) and (found := sha256_file(run)) != value:
        raise InputError(
            f"{run}: damaged: expected sha256 {value[:12]}…, as in {EVALUATION} of its folder, found {found[:12]}…"
        )


def read_judged_run(path: Path, dataset: BeirDataset, keep_identical_ids: bool) -> RankedRun:
    """Read the judged queries of a run. Unjudged passages with the id of their query are left out, unless kept."""
    run = read_trec_run(path)
    positions = [position for query in dataset.qrels if (position := run.position(query)) is not None]
    if not positions:
        first = next(iter(run.queries), "none")
        raise InputError(f"{path}: expected queries of {dataset.folder}, split {dataset.split}, found {first}")
    queries = [run.queries[position] for position in positions]
    judged = RankedRun(queries, run.passages, run.rows[positions], run.scores[positions])
    return judged if keep_identical_ids else without_identical_ids(judged, dataset.qrels)
