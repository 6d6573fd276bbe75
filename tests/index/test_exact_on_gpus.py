"""Exact search on several GPUs equals that on a CPU, bit for bit. Needs only torch, numpy and pytest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact_on_ranks import check_ranks

pytestmark = pytest.mark.multigpu


def test_results_on_several_gpus_equal_cpu_results(rng: np.random.Generator, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    check_ranks(rng, tmp_path, [number for number in (1, 2, 4, 8) if number <= gpus], "cuda")
