"""bench_image_train.py measures each of its parts and writes their rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from forks import LoadedPython

from scripts import ROOT

BENCHMARK = ROOT / "scripts/benchmarks/retriever/bench_image_train.py"


@pytest.mark.slow
def test_every_part_is_measured_and_written(python: LoadedPython, tmp_path: Path) -> None:
    words = [
        BENCHMARK,
        "--device",
        "cpu",
        "--quick",
        "--commit",
        "abc",
        "--results",
        tmp_path,
    ]
    for more in ((), ("--parts", "whole", "--keep-rows")):
        done = python.run(*words, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "image_train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["part"] for row in rows] == [
        "step",
        "loss and its gradients",
        "towers: forward, backward, forward",
        "LiT step on features",
        "LiT step that encodes its images",
        "LiT step on features, data offload",
        "step, data offload",
    ]
    assert all(float(row["seconds"]) > 0 and row["commit"] == "abc" and "synthetic" in row["data"] for row in rows)
    assert [row["pairs"] for row in rows] == ["32"] * 5 + ["64"] * 2
    assert all(float(row["planned_mib"]) > 0 for row in rows if "step" in row["part"] and "encodes" not in row["part"])
    whole, loss, towers, locked, anew, *_ = rows
    assert float(loss["of_step"]) < 1 and float(towers["step_over_this"]) > 0
    assert float(anew["times_features"]) > 1 and float(locked["seconds"]) < float(whole["seconds"])
