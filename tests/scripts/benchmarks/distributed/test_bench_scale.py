"""bench_scale.py runs on CPU processes; its table shows every row."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import LoadedPython, torchrun

from scripts import ROOT
from scripts.benchmarks import result_rows
from scripts.benchmarks.tables.launch_tables import launch_tables


@pytest.mark.slow
def test_every_part_is_measured_and_has_a_table(python: LoadedPython, tmp_path: Path) -> None:
    options = ("--device=cpu", "--quick", "--samples=1", "--step-sizes", 32, 32, "--results", tmp_path)
    words = torchrun(2, ROOT / "scripts/benchmarks/distributed/bench_scale.py", *options)
    done = python.run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = result_rows.read_rows(tmp_path / "scale.csv")
    assert {row["status"] for row in rows} == {"measured"}
    parts = [row["part"] for row in rows]
    # Six losses at two sizes, one and two ranks, and six methods for texts and for images.
    assert [parts.count(part) for part in ("loss", "scaling", "step")] == [12, 2, 12]
    assert {row["towers"] for row in rows if row["part"] == "step"} == {"bert-tiny", "tiny"}
    page = launch_tables(tmp_path)["scale"]
    assert all(f"| {row['method']} |" in page or f"{row['towers']}, {row['method']} |" in page for row in rows)
    assert (tmp_path / "scale_speed.png").exists()

    again = python.run(*words, "--budget=0", "--keep-rows", "--parts", "loss")
    assert again.returncode == 0
    rows = result_rows.read_rows(tmp_path / "scale.csv")
    assert {row["status"] for row in rows if row["part"] == "loss"} == {"no time left"}
    assert [row["part"] for row in rows].count("step") == 12
