"""The Slurm script starts a run, resumes an existing one, and requeues the job at its time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts import ROOT


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """An environment with fake Slurm commands that log their arguments; srun lasts until it is terminated."""
    commands = {
        "srun": 'echo "$@" >> "$ASKED"; trap "exit 0" TERM; while [ -e "$LASTS" ]; do sleep 0.1; done',
        "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> "$ASKED"; fi',
    }
    for name, body in commands.items():
        (file := tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    (tmp_path / "run.yaml").write_text(f"out: {tmp_path / 'run'}\n")
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    files = {"ASKED": str(tmp_path / "asked"), "LASTS": str(tmp_path / "lasts")}
    return os.environ | slurm | files | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def start(job: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    words = ["bash", str(ROOT / "scripts" / "launch" / "slurm.sbatch"), "run.yaml", "--seed", "3"]
    return subprocess.Popen(words, env=job, cwd=folder)


def test_a_run_is_started_and_resumed(job: dict[str, str], tmp_path: Path) -> None:
    assert start(job, tmp_path).wait(30) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert start(job, tmp_path).wait(30) == 0
    begun, resumed = (tmp_path / "asked").read_text().splitlines()
    assert "torchrun --nnodes=2 " in begun and "--rdzv-endpoint=node7:29400 " in begun
    assert begun.endswith("-m retriever train run.yaml --seed 3")
    assert resumed.endswith(f"-m retriever train --resume {tmp_path / 'run'}")


def test_a_job_at_its_time_limit_is_requeued(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "lasts").touch()
    running = start(job, tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 42"
