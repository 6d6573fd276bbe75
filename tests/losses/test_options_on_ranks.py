"""Matryoshka and teachers over the processes of a group equal one process: value and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import LoadedPython, torchrun

SCRIPT = Path(__file__).with_name("options_on_ranks.py")


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    with LoadedPython("losses", "torch.distributed.run") as loaded:
        yield loaded


@pytest.mark.parametrize("size", [2, 3, 4])
def test_options_over_ranks_give_the_loss_and_gradients_of_one_process(python: LoadedPython, size: int) -> None:
    done = python.run(*torchrun(size, SCRIPT, size, "cpu"))
    assert done.returncode == 0, done.stderr[-4000:]


def run_on_gpus(size: int) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(SCRIPT),
        str(size), "cuda",
    ]  # fmt: skip
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "4", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_options_on_ranks_that_share_a_gpu() -> None:
    run_on_gpus(3)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_options_on_ranks_with_a_gpu_each() -> None:
    run_on_gpus(2)
