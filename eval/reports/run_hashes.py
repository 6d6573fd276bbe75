"""Whether a run file is the one that the report beside it was made of."""

from __future__ import annotations

from pathlib import Path

from index.files import InputError, read_json, sha256_file

EVALUATION = "evaluation.json"
RUNS = "runs sha256"
"""In a set's part of evaluation.json: file name -> sha256."""


def check_run(report: Path, dataset: str, run: Path) -> None:
    """Check a run in a folder that `retriever evaluate beir` wrote against the sum that its evaluation.json states.

    Args:
        report: the folder.
        dataset: name of the set.
        run: the run's file.

    Raises:
        InputError: the run is another than the one that was evaluated, or evaluation.json cannot be read.
    """
    if not (report / EVALUATION).is_file():
        return
    value = read_json(report / EVALUATION)
    for key in ("sets", dataset, RUNS, run.name):
        value = value.get(key) if isinstance(value, dict) else None
    # Nothing is stated of other sets, nor by versions that did not.
    if isinstance(value, str) and (found := sha256_file(run)) != value:
        raise InputError(
            f"{run}: damaged: expected sha256 {value[:12]}… that {EVALUATION} of its folder states, found {found[:12]}…"
        )
