"""Script `differing_ranks.py CASES OUTCOMES`: run commands on several ranks with different arguments.

CASES is a JSON object: name -> for each rank its command line and, after "--environment", variables as NAME=VALUE. The
exit code, standard output and standard error of each rank are written to OUTCOMES in the same shape.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

import retriever.evaluation.suite
import retriever.training.trainer  # noqa: F401 - imported before the forks, which share it
from retriever.cli import command_line as cli
from retriever.training import run_dir as run_folder

SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def without_newest(checkpoints: Path) -> list[Path]:
    """Return all checkpoints but the newest, as on a file system that lags behind."""
    return sorted(checkpoints.iterdir())[:-1]


def run_rank(words: list[str], outcome: Path) -> None:
    """Run the command line and write its exit code and output."""
    torch.set_num_threads(1)
    if "WITHOUT_NEWEST" in os.environ:
        run_folder.all_checkpoints = without_newest
    out, err, code = io.StringIO(), io.StringIO(), 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception as error:  # noqa: BLE001 - shown in the outcome
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    outcome.write_text(json.dumps([code, out.getvalue(), err.getvalue()]))


def run_together(ranks: list[str], folder: Path) -> list[Any]:
    """Run each rank in a fork. A rank that does not end in time is killed, and its outcome is None."""
    port, children = free_port(), []
    for rank, line in enumerate(ranks):
        words, _, variables = line.partition(" --environment ")
        child = os.fork()
        if not child:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(ranks), "RANK": rank}
            os.environ.update({name: str(value) for name, value in meeting.items()})
            os.environ.update(dict(variable.split("=", 1) for variable in variables.split()))
            run_rank(words.split(), folder / f"{rank}.json")
            os._exit(0)
        children.append(child)
    until, left = time.monotonic() + SECONDS, set(children)
    while left and time.monotonic() < until:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [folder / f"{rank}.json" for rank in range(len(ranks))]
    outcomes = [json.loads(file.read_text()) if file.exists() else None for file in found]
    for file in found:
        file.unlink(missing_ok=True)
    return outcomes


def main(cases: Path, outcomes: Path) -> None:
    """Run all cases."""
    found, command_lines = {}, json.loads(cases.read_text())
    # The first parsing of each command is slow; its caches are shared by the forks.
    for line in {line.partition(" --")[0]: line for ranks in command_lines.values() for line in ranks}.values():
        cli._parse(line.partition(" --environment ")[0].split())
    for name, ranks in command_lines.items():
        began = time.monotonic()
        found[name] = run_together(ranks, outcomes.parent)
        print(f"{name}: {time.monotonic() - began:.2f} s", flush=True)
    outcomes.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
