"""Measured memory: the tiled loss of a large batch uses gradients and its workspace, and little more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a separate process, because the peak resident size of a process never falls.
MEASURED = """
import json, re, sys
import torch
from losses import Guide, Matryoshka, NegativeLimit, Negatives, Positives, Teacher, inf_cl_loss

pairs, dims, workspace_mib, ids = (int(argument) for argument in sys.argv[1:5])
option = sys.argv[5]
torch.set_num_threads(1)

def step(pairs, workspace_mib):
    query, passage = (torch.nn.functional.normalize(torch.randn(pairs, dims), dim=1) for _ in range(2))
    query.requires_grad_(), passage.requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    passage_ids = torch.arange(pairs) // 2 if ids else None
    given = {}
    if option == "masked":
        guide = Guide(query.detach()[:, :8].clone(), passage.detach()[:, :8].clone())
        given["negatives"] = Negatives(limit=NegativeLimit(share=0.95), guide=guide, hardness=1.0)
        given["positives"] = Positives(torch.randint(pairs, (pairs, 2)))
        given["statistics"] = True
    if option == "matryoshka":
        given["matryoshka"] = Matryoshka((dims // 4, dims // 2, dims))
    if option == "teacher":
        sides = (torch.nn.functional.normalize(torch.randn(pairs, dims), dim=1) for _ in range(2))
        given["teacher"] = Teacher(*sides, scale=20.0)
    before = peak()
    loss = inf_cl_loss(
        query, passage, logit_scale=scale, symmetric=True, passage_ids=passage_ids, workspace_mib=workspace_mib,
        implementation="chunked", **given,
    )
    loss = loss[0] if option == "masked" else loss
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all() and passage.grad.isfinite().all()
    return peak() - before

def peak():
    # Not getrusage: on Linux a process inherits the peak of its parent there, which would hide growth.
    (kib,) = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(kib) / 1024

step(256, 1)
print(json.dumps(step(pairs, workspace_mib)))
"""


def peak_growth_mib(pairs: int, dims: int, workspace_mib: int, ids: bool, option: str = "none") -> float:
    arguments = [*(str(int(value)) for value in (pairs, dims, workspace_mib, ids)), option]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True, timeout=240
    )
    return float(json.loads(measured.stdout))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_peak_memory_of_32768_pairs_is_gradients_and_workspace() -> None:
    pairs, dims, workspace_mib = 32_768, 64, 64
    gradients_mib = 2 * pairs * dims * 4 / 2**20
    vectors_mib = 20 * pairs * 8 / 2**20
    growth = peak_growth_mib(pairs, dims, workspace_mib, ids=False)
    # The full matrix alone is 4096 MiB.
    assert growth <= gradients_mib + vectors_mib + workspace_mib + 16


def test_peak_memory_follows_the_workspace() -> None:
    pairs, dims = 6_000, 32
    gradients_mib = 2 * pairs * dims * 4 / 2**20
    assert peak_growth_mib(pairs, dims, 2, ids=True) <= gradients_mib + 20 * pairs * 8 / 2**20 + 2 + 6


@pytest.mark.slow
def test_peak_memory_with_masked_negatives_is_linear() -> None:
    pairs, dims, workspace_mib = 12_000, 32, 8
    # The sums of the query gradients are kept beside the gradients.
    gradients_mib = 3 * pairs * dims * 4 / 2**20
    lists_mib = 2 * 200 * pairs / 2**20
    growth = peak_growth_mib(pairs, dims, workspace_mib, ids=True, option="masked")
    # The full matrix alone is 549 MiB.
    assert growth <= gradients_mib + 40 * pairs * 8 / 2**20 + lists_mib + workspace_mib + 16


@pytest.mark.parametrize("option", ["matryoshka", "teacher"])
def test_peak_memory_with_another_objective_is_linear(option: str) -> None:
    pairs, dims = 6_000, 32
    # Gradients and, for each side, their float32 sums.
    gradients_mib = 4 * pairs * (dims + 4) * 4 / 2**20
    growth = peak_growth_mib(pairs, dims, 4, ids=False, option=option)
    # One matrix of scores is 137 MiB.
    assert growth <= gradients_mib + 60 * pairs * 4 / 2**20 + 4 + 6
