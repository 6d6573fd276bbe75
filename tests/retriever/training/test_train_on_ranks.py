"""Training on several processes equals training on one; if a process fails, the job ends and can be resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from cli_helpers import write_beir, write_lines
from forks import LoadedPython, environment, torchrun
from run_helpers import assert_near, results
from torch import distributed

from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import save_config
from retriever.distributed.ranks import Ranks

HERE = Path(__file__).parents[1]
WORDS = ["cat", "dog", "run", "walk", "eat", "sleep", "tree", "house", "river", "stone", "blue", "red", "small", "old"]


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> Path:
    """8 steps on pairs with one to three positives, hard negatives and duplicate texts; every fourth batch is the whole
    of a small source."""
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(random.choice(WORDS, size=3))

    rows: list[object] = [
        {"query": text(), "positive": [text() for _ in range(1 + i % 3)], "negatives": [text() for _ in range(i % 4)]}
        for i in range(40)
    ]
    rows += [{**row, "negatives": []} for row in rows[:8] if isinstance(row, dict)]
    sources = (
        SourceConfig(path=str(write_lines(tmp_path / "pairs.jsonl", rows)), weight=3),
        SourceConfig(path=str(write_lines(tmp_path / "few.jsonl", rows[20:27])), weight=1),
    )
    config = TrainConfig(
        model=dataclasses.replace(tiny, dropout=0.0),
        data=DataConfig(sources=sources, workers=0, negatives=2),
        loss=LossConfig(learn_logit_scale=True, symmetric=True),
        # Adam divides by the magnitude of a gradient, and some gradients are rounding errors.
        optim=OptimConfig(lr=1e-3, eps=1e-3),
        dev=DevConfig(path=str(write_beir(tmp_path / "words")), every=3),
        batch_size=16,
        steps=8,
        micro_batch_tokens=60,
        log_every=1,
        checkpoint_every=4,
        keep_checkpoints=3,
        precision="fp32",
        device="cpu",
    )
    save_config(config, path := tmp_path / "run.yaml")
    return path


def on_gpus(size: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *torchrun(size, *words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("part", "compared"),
    [
        ("sizes", ["3", "4", "changed"]),
        ("losses", ["clip", "sigmoid"]),
        ("batches", ["switches", "blocks"]),
        ("stored", ["teacher", "frozen"]),
    ],
)
def test_the_number_of_processes_does_not_change_training(
    python: LoadedPython, config: Path, tmp_path: Path, part: str, compared: list[str]
) -> None:
    done = python.run(HERE / "train_on_ranks.py", config, part, folder=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == compared


def test_sharded_towers_train_like_unsharded_ones(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    done = python.run(HERE / "sharded_on_ranks.py", config, folder=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["3", "2", "1"]


@pytest.mark.slow
def test_sharded_towers_with_lora_train_like_unsharded_ones(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    # A rank that the three processes divide.
    done = python.run(HERE / "sharded_on_ranks.py", config, "6", folder=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["3", "2", "1"]


def test_a_killed_process_ends_the_job_which_can_be_resumed(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = time.monotonic()
    # torchrun would interrupt the other process as soon as it notices, perhaps before that process does.
    words = (HERE / "failing_rank.py", "killed", "train", config, "--out", run)
    done = python.run(*torchrun(2, *words, interval=4))
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert "another process of this job has ended" in done.stderr, done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004"]
    done = python.run(*torchrun(3, "-m", "retriever", "train", "--resume", run))
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in results(run)["rows"] if "loss" in row]
    assert steps == list(range(1, 9))


def test_only_the_error_of_the_failed_process_is_shown(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    done = python.run(*torchrun(3, HERE / "failing_rank.py", "error", "train", config, "--out", tmp_path / "run"))
    assert done.returncode != 0 and time.monotonic() - start < 60
    errors = [line for line in done.stderr.splitlines() if line.startswith("retriever:")]
    assert errors == ["retriever: words.jsonl: line 7: the disk says no"], done.stderr


def test_a_job_restarted_by_torchrun_resumes(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = python.run(*torchrun(2, HERE / "failing_rank.py", "killed", "train", config, "--out", run, restarts=1))
    assert done.returncode == 0, done.stderr
    newest = run / "checkpoints" / "step-00000004"
    assert done.stderr.count(f"restarted by torchrun (attempt 1): resuming from {newest} (step 4 of 8)") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))


def test_a_run_of_another_job_is_refused_after_a_restart(python: LoadedPython, config: Path, tmp_path: Path) -> None:
    words = ("-m", "retriever", "train", config, "--steps", 1, "--out", tmp_path / "run")
    assert python.run(*torchrun(2, *words)).returncode == 0
    done = python.run(*torchrun(2, *words, restarts=1))
    assert done.returncode != 0 and "resuming" not in done.stderr, done.stderr
    assert done.stderr.count("holds a run already") == 2


def test_a_run_counts_as_started_by_the_job_if_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    job = distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert Ranks().has_started("runs/a") and Ranks(1, 2, job).has_started("runs/a")
    job.set("met 1", "")
    assert not Ranks(1, 2, job).has_started("runs/a")
    Ranks(1, 2, job).mark_started("runs/a")
    assert not Ranks(1, 2, job).has_started("runs/a")
    Ranks(0, 2, job).mark_started("runs/a")
    assert Ranks(1, 2, job).has_started("runs/a") and not Ranks(1, 2, job).has_started("runs/b")


def test_a_waiting_process_ends_with_a_signal_or_its_parent(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
            "RANK": "0",
        }
    script = (
        "from retriever.distributed.context import joined_ranks; print('here', flush=True); joined_ranks().__enter__()"
    )
    waits = [sys.executable, "-c", script]
    waiting = subprocess.Popen(waits, env=environment() | meeting, stdout=subprocess.PIPE)
    assert waiting.stdout is not None and waiting.stdout.readline() == b"here\n"
    time.sleep(1)
    waiting.terminate()
    assert waiting.wait(10) != 0
    # A killed parent cannot notify its child.
    parent = f"import subprocess, sys; child = subprocess.Popen({waits!r}); print(child.pid, flush=True); child.wait()"
    parent_process = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment() | meeting, stdout=subprocess.PIPE
    )
    assert parent_process.stdout is not None
    child = psutil.Process(int(parent_process.stdout.readline()))
    assert parent_process.stdout.readline() == b"here\n"
    time.sleep(1)
    parent_process.kill()
    parent_process.wait()
    assert psutil.wait_procs([child], timeout=10)[0]


@pytest.mark.slow
def test_the_launch_recipe_trains_on_two_machines(config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    recipe = HERE.parents[1] / "scripts" / "launch" / "several_nodes.sh"
    words = [str(recipe), str(config), "--steps", "2", "--dev.path", "", "--out", str(tmp_path / "run")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    about = environment() | {"NODES": "2", "HEAD": "127.0.0.1", "GPUS": "1", "PORT": port, "PATH": path}
    machines = [subprocess.Popen(words, env=about, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    # Only rank 0 prints.
    assert sum("step 2/2" in text for text in errors) == 1
    assert len([row for row in results(tmp_path / "run")["rows"] if "loss" in row]) == 2


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("sharded", "precision", "allowed"), [(False, "fp32", 1e-3), (True, "fp32", 1e-3), (True, "bf16", 3e-2)]
)
def test_two_gpus_train_like_one(config: Path, tmp_path: Path, sharded: bool, precision: str, allowed: float) -> None:
    words = ["-m", "retriever", "train", config, "--device", "cuda", "--precision", precision, "--dev.path", ""]
    for size, more in ((1, []), (2, ["--shard-towers"] if sharded else [])):
        done = on_gpus(size, *words, *more, "--out", tmp_path / str(size))
        assert done.returncode == 0, done.stderr
    assert_near(results(tmp_path / "2"), results(tmp_path / "1"), allowed)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_killed_process_ends_a_job_on_gpus(config: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    words = ("train", config, "--device", "cuda", "--dev.path", "", "--out", tmp_path / "run")
    done = on_gpus(2, HERE / "failing_rank.py", "killed", *words)
    assert done.returncode != 0 and time.monotonic() - start < 90, done.stderr
