"""Exact search by several GPUs gives the bits of a processor. Needs torch, numpy and pytest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact_on_ranks import check_ranks

pytestmark = pytest.mark.multigpu


def test_gpus_find_the_bytes_of_a_processor(rng: np.random.Generator, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    check_ranks(rng, tmp_path, [number for number in (1, 2, 4, 8) if number <= gpus], "cuda")
