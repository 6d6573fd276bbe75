"""The memory that --dry-run plans is what a run uses."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import command, write_lines

from retriever.config.data import DataConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import save_config

HERE = Path(__file__).parents[1]


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Towers of 50 million parameters, mostly token embeddings, so that a step is short."""
    assert tiny.architecture is not None
    random = np.random.default_rng(0)
    rows: list[object] = [
        {"query": "".join(random.choice(list("abcdef"), 20)), "positive": "".join(random.choice(list("abcdef"), 50))}
        for _ in range(64)
    ]
    wide = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 200_000}
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=dataclasses.replace(tiny, architecture=tiny.architecture | wide),
        data=DataConfig(sources=(SourceConfig(path=str(write_lines(tmp_path / "pairs.jsonl", rows))),), workers=0),
        loss=LossConfig(symmetric=True),
        batch_size=64,
        steps=2,
        micro_batch_tokens=2048,
        checkpoint_every=100,
        precision="auto" if torch.cuda.is_available() else "fp32",
    )


def planned(config: Path, *more: str) -> float:
    outcome = command("train", config, "--dry-run", *more)
    assert outcome.code == 0, outcome.err
    match = re.search(r"peak +([\d,]+) MiB", outcome.out)
    assert match is not None, outcome.out
    return float(match[1].replace(",", ""))


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def assert_planned(config: TrainConfig, tmp_path: Path, processes: int = 1) -> str:
    """Compare the planned with the measured peak. Returns the output of the plan."""
    save_config(config, file := tmp_path / "run.yaml")
    # In a new process, because memory used before stays with a process.
    words = [sys.executable, "-m", "retriever", "train", str(file), "--dry-run", f"--processes={processes}"]
    dry = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert dry.returncode == 0, dry.stderr
    match = re.search(r"peak +([\d,]+) MiB", dry.stdout)
    assert match is not None
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [sys.executable, *(torchrun if processes > 1 else []), str(HERE / "peak_of_training.py"), str(file)]
    real = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert real.returncode == 0, real.stderr
    assert float(match[1].replace(",", "")) * 2**20 == pytest.approx(float(real.stdout), rel=0.15)
    return dry.stdout


def test_the_planned_peak_equals_the_measured_one(config: TrainConfig, tmp_path: Path) -> None:
    assert_planned(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batch_tokens_limit", "micro_batches"), [(1024, 7), (10**6, 1)])
def test_the_planned_peak_is_right_if_graphs_dominate(
    config: TrainConfig, tmp_path: Path, micro_batch_tokens_limit: int, micro_batches: int
) -> None:
    architecture = config.model.architecture
    assert architecture is not None
    deep = architecture | {"vocab_size": 200, "num_hidden_layers": 16}
    # Texts of equal length, so that only the token budget cuts micro-batches.
    rows: list[object] = [
        {"query": "abcde" * 9, "positive": f"{chr(97 + n // 8)}{chr(97 + n % 8)}abc" * 9} for n in range(64)
    ]
    pairs = SourceConfig(path=str(write_lines(tmp_path / "even.jsonl", rows)))
    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, architecture=deep),
        data=dataclasses.replace(config.data, sources=(pairs,)),
        micro_batch_tokens=micro_batch_tokens_limit,
    )
    assert f" in {micro_batches} micro-batches" in assert_planned(changed, tmp_path)


@pytest.mark.slow
def test_the_planned_peak_is_right_for_sharded_towers(config: TrainConfig, tmp_path: Path) -> None:
    assert_planned(dataclasses.replace(config, shard_towers=True), tmp_path, processes=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("optimizer", "cuda_graphs"), [("adamw", False), ("adafactor", False), ("adamw", True)])
def test_the_planned_peak_equals_the_measured_one_on_a_gpu(
    config: TrainConfig, tmp_path: Path, optimizer: str, cuda_graphs: bool
) -> None:
    optim = OptimConfig(name="adafactor" if optimizer == "adafactor" else "adamw")
    changed = dataclasses.replace(config, optim=optim, micro_batch_tokens=None, cuda_graphs=cuda_graphs)
    assert_planned(changed, tmp_path)


def test_planning_starts_no_run_and_more_processes_need_less(config: TrainConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=16))
    save_config(small, file := tmp_path / "run.yaml")
    assert planned(file, "--processes", "8") <= planned(file)
    assert not (Path(config.out) / "config.yaml").exists()


def test_processes_requires_dry_run(tmp_path: Path) -> None:
    outcome = command("train", "--processes", "8")
    assert outcome.code == 2 and "--processes" in outcome.err
