"""Any options together give the loss, the gradients and the statistics of their equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import defined, errors, found_by, random_case
from forks import LoadedPython, torchrun
from torch import Tensor

from losses.triton.launch import interpreted

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def assert_defined(seed: int, names: tuple[str, ...], dtype: torch.dtype, device: str = "cpu", **how: Any) -> None:
    case = random_case(seed, names, largest=7 if names else 19)
    allowed = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, case.scale / 20)
    truth, expected = defined(case)
    found, statistics = found_by(case, dtype, device, **how)
    assert max(errors(found, truth, case)) <= allowed, (seed, case.arguments.keys(), errors(found, truth, case))
    if statistics is None:
        return
    for name, theirs in expected.items():
        ours: Tensor = getattr(statistics, name).double().cpu()
        torch.testing.assert_close(ours, theirs.double(), rtol=10 * allowed, atol=10 * allowed, msg=f"{seed} {name}")


@pytest.mark.parametrize("implementation", ["full", "chunked"])
def test_random_options_follow_their_equations(implementation: str) -> None:
    for seed in range(30):
        assert_defined(seed, (), torch.float64, implementation=implementation, workspace_mib=0.005)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "names",
    [
        ("matryoshka", "limit", "guide", "statistics"),
        ("matryoshka", "own", "frozen", "hardness", "scores"),
        ("matryoshka", "same_side"),
        ("positives", "scores", "frozen", "statistics"),
        ("teacher", "statistics"),
    ],
    ids="-".join,
)
def test_kernels_follow_the_equations_of_several_options(names: tuple[str, ...], device: str) -> None:
    pytest.importorskip("triton")
    assert_defined(5, names, torch.float32, device, implementation="triton", workspace_mib=0.05)


@pytest.mark.slow
def test_random_options_over_three_unequal_ranks_follow_their_equations() -> None:
    with LoadedPython("losses", "torch.distributed.run") as python:
        done = python.run(*torchrun(3, Path(__file__).with_name("definitions_on_ranks.py")))
    assert done.returncode == 0, done.stderr[-4000:]
