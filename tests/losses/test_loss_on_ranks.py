"""The loss over the processes of a gloo group equals that of one process: value, gradients, parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import LoadedPython, torchrun

SCRIPT = Path(__file__).with_name("loss_on_ranks.py")


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    with LoadedPython("losses", "torch.distributed.run", "torch.nn.parallel") as loaded:
        yield loaded


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_gradients_of_one_process(python: LoadedPython, size: int) -> None:
    done = python.run(*torchrun(size, SCRIPT, size))
    assert done.returncode == 0, done.stderr[-4000:]
