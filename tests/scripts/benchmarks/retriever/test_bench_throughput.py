"""Benchmarks of training and encoding keep within their time budget and replace only rows of the same hardware."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever import bench_train


def test_repeats_fill_their_share_of_the_remaining_time() -> None:
    budget = bench_train.Budget(100.0, start=time.perf_counter() - 20)
    assert budget.repeats(0.5, 3.9, least=1, most=50) == 10
    assert budget.repeats(0.5, 3.9, least=1, most=4) == 4
    assert budget.repeats(0.5, 1000.0, least=2, most=4) == 2
    # Without a known duration or without a limit, the requested number.
    assert budget.repeats(0.5, 0.0, least=2, most=4) == bench_train.Budget(None).repeats(0.5, 9.0, least=2, most=4) == 4
    assert bench_train.Budget(1.0, start=time.perf_counter() - 20).left() == 0


def test_rows_of_the_same_hardware_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    for rows in ([("a", 1)], [("b", 2)], [("a", 3)], [("a", 3), ("a", 4)]):
        update_rows([{"hardware": name, "batch": batch} for name, batch in rows], path, key=["hardware"])
    with path.open(encoding="utf-8", newline="") as stream:
        assert [tuple(row.values()) for row in csv.DictReader(stream)] == [("b", "2"), ("a", "3"), ("a", "4")]
