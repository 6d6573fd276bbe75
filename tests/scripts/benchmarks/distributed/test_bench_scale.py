"""bench_scale.py runs on CPU processes; its tables come from its rows, and so does scripts/launch/README.md."""

from __future__ import annotations

from pathlib import Path

from forks import LoadedPython, torchrun

from scripts import RESULTS, ROOT
from scripts.benchmarks import result_rows
from scripts.benchmarks.tables import launch_tables


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
    page = launch_tables.filled("<!-- scale -->\nold\n<!-- /scale -->", tmp_path)
    assert "old" not in page
    assert all(f"| {row['method']} |" in page or f"{row['towers']}, {row['method']} |" in page for row in rows)
    assert (tmp_path / "scale_speed.png").exists()

    again = python.run(*words, "--budget=0", "--keep-rows", "--parts", "loss")
    assert again.returncode == 0
    rows = result_rows.read_rows(tmp_path / "scale.csv")
    assert {row["status"] for row in rows if row["part"] == "loss"} == {"no time left"}
    assert [row["part"] for row in rows].count("step") == 12


def test_launch_readme_shows_the_committed_results() -> None:
    page = launch_tables.README.read_text(encoding="utf-8")
    assert launch_tables.filled(page, RESULTS) == page
