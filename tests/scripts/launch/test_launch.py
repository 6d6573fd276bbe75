"""The Slurm script starts a run, resumes it after a requeue, refuses another's, and requeues only at its time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import ROOT

FLAGS = ("--seed", "3")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins of srun and scontrol that log their arguments; srun lasts until it is stopped."""
    commands = {
        "srun": (
            'echo "$@" >> "$ASKED"; trap "exit 15" TERM; while [ -e "$LASTS" ]; do sleep 0.1; done; exit "${CODE:-0}"'
        ),
        "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> "$ASKED"; fi',
    }
    for name, body in commands.items():
        (file := tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    (tmp_path / "run.yaml").write_text(f"out: {tmp_path / 'run'}\n")
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    files = {"ASKED": str(tmp_path / "asked"), "LASTS": str(tmp_path / "lasts")}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | slurm | files | {"PATH": path}


def start(
    job: dict[str, str], folder: Path, *words: str, script: str = "slurm.sbatch", **more: str
) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "scripts" / "launch" / script), *words]
    return subprocess.Popen(command, env=job | more, cwd=folder, stderr=subprocess.PIPE, text=True)


def refused(running: subprocess.Popen[str]) -> str:
    message = running.communicate(timeout=60)[1]
    assert running.returncode == 2, message
    return message


def test_a_run_is_started_and_resumed_by_its_own_job(job: dict[str, str], tmp_path: Path) -> None:
    assert start(job, tmp_path, "run.yaml", *FLAGS).wait(60) == 0
    # A requeue before the run had begun.
    assert start(job, tmp_path, "run.yaml", *FLAGS, SLURM_RESTART_COUNT="1").wait(60) == 0
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    message = refused(start(job, tmp_path, "run.yaml", *FLAGS))
    assert f"{tmp_path / 'run'} holds a run already: continue it with RESUME=1" in message
    assert "other holds a run already" in refused(start(job, tmp_path, "run.yaml", "--out", "a", "--out=other"))
    assert "give no flags" in refused(start(job, tmp_path, "run.yaml", *FLAGS, RESUME="1"))
    assert start(job, tmp_path, "run.yaml", *FLAGS, SLURM_RESTART_COUNT="1").wait(60) == 0
    assert start(job, tmp_path, "run.yaml", RESUME="1").wait(60) == 0
    assert start(job, tmp_path, "run.yaml", "--out", "new").wait(60) == 0
    begun, again, requeued, resumed, other = (tmp_path / "asked").read_text().splitlines()
    assert "torchrun --nnodes=2 " in begun and "--rdzv-endpoint=node7:29400 " in begun
    assert begun == again and begun.endswith("-m retriever train run.yaml --seed 3")
    assert requeued == resumed and resumed.endswith(f"-m retriever train --resume {tmp_path / 'run'}")
    assert other.endswith("-m retriever train run.yaml --out new")


def test_missing_arguments_are_refused_before_anything_starts(job: dict[str, str], tmp_path: Path) -> None:
    assert "expected a configuration" in refused(start(job, tmp_path))
    assert "none.yaml: no such file" in refused(start(job, tmp_path, "none.yaml"))
    (tmp_path / "bad.yaml").write_text("batchsize: 3\n")
    assert "batchsize: unknown key" in refused(start(job, tmp_path, "bad.yaml"))
    for script in ("one_node.sh", "several_nodes.sh"):
        assert "expected a configuration" in refused(start(job, tmp_path, script=script))
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("number", "requeues"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time limit", "cancelled"]
)
def test_only_a_job_at_its_time_limit_is_requeued(
    job: dict[str, str], tmp_path: Path, number: signal.Signals, requeues: bool
) -> None:
    (tmp_path / "lasts").touch()
    running = start(job, tmp_path, "run.yaml")
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    assert running.wait(60) == 15
    assert (tmp_path / "asked").read_text().splitlines()[1:] == ["requeue 42"] * requeues


def test_a_run_that_fails_is_not_requeued(job: dict[str, str], tmp_path: Path) -> None:
    assert start(job, tmp_path, "run.yaml", CODE="7").wait(60) == 7
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
