"""Usage: `suite_on_ranks.py MODEL DATA OUT`. Compares evaluations on 1, 2 and 4 processes and resumed ones.

Every process is a fork of this one, which has imported the libraries, and runs the command line as torchrun would.
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
from retriever.models.modality import load_towers

# Writing the report takes longer than the evaluation and is not tested here.
suite_report.write = lambda folder, report: []


def evaluation(model: str, data: str, out: Path) -> Callable[[], object]:
    """`retriever evaluate beir` with small shards."""
    words = ["evaluate", "beir", "--model", model, "--data", data, "--out", str(out), "--shard-rows", "3", "--k", "7"]

    def run() -> None:
        assert command_line(words) == 0

    return run


def encoding(model: str, data: str, out: Path) -> Callable[[], object]:
    """`retriever encode` with small shards."""
    words = ["encode", "--model", model, "--data", data, "--out", str(out), "--shard-rows", "3"]

    def run() -> None:
        assert command_line(words) == 0

    return run


def compared_files(out: Path) -> dict[str, bytes]:
    """The files that must not depend on the number of ranks."""
    names = ("*.trec", "*/embeddings/*")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in sorted(out.rglob(name))}


def main(model: str, data: str, folder: Path) -> None:
    """Run all evaluations and compare their files."""
    load_towers(model)  # imports the libraries before the forks
    single = folder / "single"
    assert forked(evaluation(model, data, single)) == 0
    changes, expected = int(Path("count").read_text()), compared_files(single)
    assert len(expected) == 1 + 1 + 3 * 7
    for size in (2, 4):
        on_ranks(size, evaluation(model, data, folder / str(size)))
        assert compared_files(folder / str(size)) == expected, size
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
        assert compared_files(out) == expected, part
        print(part, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
