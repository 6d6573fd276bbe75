"""Script `suite_on_ranks.py MODEL DATA OUT`: evaluate with 1, 2 and 4 processes, and resume killed evaluations.

Every process is a fork of this one, which has imported the libraries, and runs the command line as under torchrun.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from forks import on_ranks
from killed_runs import forked

from eval.reports import suite as suite_report
from retriever.cli.command_line import main as command_line
from retriever.models.towers import load_towers

# The report is not tested here and takes longer than everything else.
suite_report.write = lambda folder, report: []


def evaluation(model: str, data: str, out: Path) -> Callable[[], object]:
    """Return a function that evaluates with small shards."""
    words = ["evaluate", "beir", "--model", model, "--data", data, "--out", str(out), "--shard-rows", "3", "--k", "7"]

    def run() -> None:
        assert command_line(words) == 0

    return run


def encoding(model: str, data: str, out: Path) -> Callable[[], object]:
    """Return a function that encodes with small shards."""
    words = ["encode", "--model", model, "--data", data, "--out", str(out), "--shard-rows", "3"]

    def run() -> None:
        assert command_line(words) == 0

    return run


def kept(out: Path) -> dict[str, bytes]:
    """Read the files that must not depend on the number of processes."""
    names = ("*.trec", "*/embeddings/*")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in sorted(out.rglob(name))}


def main(model: str, data: str, folder: Path) -> None:
    """Compare all evaluations."""
    load_towers(model)  # before the forks, which share the libraries
    whole = folder / "whole"
    assert forked(evaluation(model, data, whole)) == 0
    changes, expected = int(Path("count").read_text()), kept(whole)
    assert len(expected) == 1 + 1 + 3 * 7
    for size in (2, 4):
        on_ranks(size, evaluation(model, data, folder / str(size)))
        assert kept(folder / str(size)) == expected, size
        print(size, flush=True)
    for size in (1, 3):
        on_ranks(size, encoding(model, data, folder / f"encoded{size}"))
    first, second = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("encoded1", "encoded3")
    )
    assert first == second and len(first) > 5
    for part in (0.2, 0.7):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        assert forked(evaluation(model, data, out), round(part * changes)) == signal.SIGKILL
        on_ranks(2, evaluation(model, data, out))
        assert kept(out) == expected, part
        print(part, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
