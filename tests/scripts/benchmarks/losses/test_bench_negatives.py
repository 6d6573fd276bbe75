"""The benchmark of negatives outside the pool checks every case before it writes a row for each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scripts.benchmarks import result_rows
from scripts.benchmarks.losses import bench_negatives


def run(monkeypatch: pytest.MonkeyPatch, results: Path) -> list[dict[str, str]]:
    words = ["bench_negatives.py", "--device", "cpu", "--quick", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        bench_negatives.main()
    finally:
        rows = result_rows.read_rows(results / "loss_negatives.csv")
    return rows


def test_every_case_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path)
    assert [(row["part"], row["case"]) for row in rows] == [(case.part, case.name) for case in bench_negatives.CASES]
    assert all(float(row["milliseconds"]) > 0 and row["commit"] for row in rows)


def test_inexact_gradients_fail_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_negatives, "TOLERANCE", {torch.float32: 1e-9})
    with pytest.raises(SystemExit, match="not exact enough:\nplain, float32"):
        run(monkeypatch, tmp_path)
