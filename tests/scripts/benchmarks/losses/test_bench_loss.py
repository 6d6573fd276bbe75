"""The loss benchmark reports an error with every time, and a reason where a method cannot run."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from scripts.benchmarks.losses import bench_loss, loss_check, loss_clock, loss_methods, loss_plots


def run(monkeypatch: pytest.MonkeyPatch, results: Path, *words: str) -> list[dict[str, str]]:
    """Rows of a small run on the CPU, without Triton's interpreter, which would take seconds per row."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench_loss.py", "--device", "cpu", "--quick", "--results", str(results), *words])
    try:
        bench_loss.main()
    finally:
        with (results / "loss.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    return rows


def replaced(monkeypatch: pytest.MonkeyPatch, *some: object) -> None:
    monkeypatch.setattr(bench_loss, "methods", lambda workspace_mib, open_mib: list(some))


def test_every_method_has_a_row_with_its_errors_or_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "--seconds", "0.01")
    sizes = [row for row in rows if row["part"] == "sizes"]
    assert {row["method"] for row in sizes} == {method.name for method in loss_methods.methods(256, 9500)}
    assert all(row["commit"] and row["torch"] for row in rows)
    for row in sizes:
        assert bool(row["milliseconds"]) == (row["status"] == "measured") == bool(row["error_dq"])
        if row["error_dq"]:
            assert max(float(row[f"error_{name}"]) for name in ("loss", "dq", "dk")) < 0.02, row["method"]
    assert {"ours, chunked bf16", "full matrix, tf32", "row chunks, one direction", "ours, sigmoid chunked bf16"} <= {
        row["method"] for row in sizes if row["status"] == "measured"
    }
    assert {row["exact"] for row in sizes if row["method"] == "ours, chunked fp32"} == {"yes"}
    assert (tmp_path / "loss_time.png").exists()


def test_an_inexact_loss_fails_the_run_after_its_rows_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(pairs: object) -> object:
        found = loss_methods.ours(pairs, "chunked", "fp32", 64)
        gradients = (found.gradients[0] * 1.0001, *found.gradients[1:])
        return dataclasses.replace(found, gradients=gradients)

    replaced(monkeypatch, loss_methods.Method("wrong", wrong, operands=torch.float32, tolerance=loss_methods.FP32))
    with pytest.raises(SystemExit, match=r"wrong at 128 × 32: relative error of dq 1\.00e-04"):
        run(monkeypatch, tmp_path, "--parts", "sizes")
    with (tmp_path / "loss.csv").open(newline="") as stream:
        assert [row["exact"] for row in csv.DictReader(stream) if row["part"] == "sizes"] == ["no", "no"]


def test_no_larger_batch_is_tried_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def greedy(pairs: object) -> object:
        asked.append(len(pairs.query))
        if len(pairs.query) > 128:
            raise torch.OutOfMemoryError
        return loss_methods.ours(pairs, "chunked", "bf16", 64)

    replaced(monkeypatch, loss_methods.Method("greedy", greedy))
    rows = run(monkeypatch, tmp_path, "--parts", "sizes", "--sizes", "128", "256", "512", "--seconds", "0.01")
    statuses = [row["status"] for row in rows if row["part"] == "sizes"]
    assert statuses == ["measured", "out of memory", "out of memory"]
    assert set(asked) == {128, 256}


def test_a_nan_error_is_a_fault() -> None:
    assert loss_check.fault({"loss": float("nan")}, loss_methods.BF16)
    assert loss_check.fault({"loss": 9e-5, "dq": 3e-3}, loss_methods.BF16) is None


def test_missing_and_failing_packages_are_reported_as_such() -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'memeff'")

    def failing() -> None:
        raise AssertionError("needs bf16\nmore")

    assert loss_clock.attempted(missing, False).text == "not installed: No module named 'memeff'"
    assert loss_clock.attempted(failing, False).text == "failed: AssertionError: needs bf16"


def test_plots_are_drawn_with_labels_apart(tmp_path: Path) -> None:
    with (tmp_path / "loss.csv").open("w", newline="") as stream:
        names = ["part", "method", "kind", "size", "dim", "milliseconds", "extra_mib", "hardware"]
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for method in loss_methods.methods(256, 9500):
            for size in (4096, 65536):
                figures = {"milliseconds": size / 1000, "extra_mib": size / 100, "hardware": "a GPU", "dim": 768}
                writer.writerow({"part": "sizes", "method": method.name, "kind": method.kind, "size": size, **figures})
    loss_plots.draw(tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("loss_memory.png", "loss_time.png"))

    heights = loss_plots.apart([0.9, 0.9, 0.9, 0.1])
    assert all(abs(a - b) >= loss_plots.LEAST_GAP * 0.999 for i, a in enumerate(heights) for b in heights[:i])
    assert max(heights) <= 1
