"""Read and compare the results of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retriever.config.run import TrainConfig


def results(run: Path) -> dict[str, Any]:
    """Read everything that a run has written, except for times and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("pairs_per_second", "tokens_per_second", "memory_mib"):
            row.pop(key, None)
    folders = sorted((run / "checkpoints").iterdir())
    names = ("towers", "loss", "optimizer")
    tensors = {name: load_file(folders[-1] / f"{name}.safetensors") for name in names}
    model = {p.name: p.read_bytes() for p in sorted((run / "model").rglob("*")) if p.is_file()}
    return {"rows": rows, "checkpoints": [f.name for f in folders], "tensors": tensors, "model": model}


def losses(config: TrainConfig) -> list[float]:
    """The loss of each logged step of a run."""
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def assert_near(one: dict[str, Any], other: dict[str, Any], allowed: float = 2e-5) -> None:
    """Check that results are equal up to rounding of float32 sums."""
    assert one["checkpoints"] == other["checkpoints"]
    assert one["model"].keys() == other["model"].keys()
    for mine, theirs in zip(one["rows"], other["rows"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert abs(value - theirs[key]) <= allowed * max(1, abs(value)), (mine["step"], key, value, theirs[key])
    for name, tensors in one["tensors"].items():
        for key, tensor in tensors.items():
            error = float((tensor - other["tensors"][name][key]).abs().max())
            assert error <= allowed * max(1, float(tensor.abs().max())), (name, key, error)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that results are bitwise equal."""
    assert one["rows"] == other["rows"]
    assert one["checkpoints"] == other["checkpoints"]
    assert one["model"] == other["model"]
    for name, tensors in one["tensors"].items():
        assert tensors.keys() == other["tensors"][name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other["tensors"][name][key]), f"{name}/{key}"
