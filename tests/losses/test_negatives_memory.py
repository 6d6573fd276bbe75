"""Measured memory: negatives outside the pool add gradients of their own, and little more."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a separate process, because the peak resident size of a process never falls.
MEASURED = """
import re, sys
import torch
from losses import Negatives, Ragged, inf_cl_loss

pairs, dims, workspace_mib = (int(argument) for argument in sys.argv[1:])
torch.set_num_threads(1)

def unit(rows):
    return torch.nn.functional.normalize(torch.randn(rows, dims), dim=1)

def step(pairs, workspace_mib):
    query, passage, own = (unit(rows).requires_grad_() for rows in (pairs, pairs, 4 * pairs))
    negatives = Negatives(own=Ragged(own, 4 * torch.arange(pairs + 1)), frozen=unit(2 * pairs), same_side=True)
    before = peak()
    loss = inf_cl_loss(
        query, passage, logit_scale=20.0, symmetric=True, negatives=negatives, workspace_mib=workspace_mib,
        implementation="chunked",
    )
    loss.backward()
    assert loss.isfinite() and own.grad.isfinite().all()
    return peak() - before

def peak():
    # Not getrusage: on Linux a process inherits the peak of its parent there, which would hide growth.
    (kib,) = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(kib) / 1024

step(256, 1)
print(step(pairs, workspace_mib))
"""


@pytest.mark.timeout(300)
def test_peak_memory_is_gradients_and_workspace() -> None:
    pairs, dims, workspace_mib = 10_000, 64, 16
    arguments = [str(number) for number in (pairs, dims, workspace_mib)]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    # Gradients of 6 sides (own negatives are 4); sums of both sides and of the means of frozen passages.
    side_mib = pairs * dims * 4 / 2**20
    # One score matrix alone is 381 MiB.
    assert float(measured.stdout) <= 14 * side_mib + workspace_mib + 24
