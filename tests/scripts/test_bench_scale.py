"""The benchmark of a node's GPUs runs by processes on a CPU; its tables are of its rows, and so is the page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from builders import SCRIPTS, load

result_rows = load("result_rows")
launch_tables = load("launch_tables")


def test_every_part_is_measured_and_has_its_table(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPTS / "bench_scale.py")]
    words = [
        sys.executable,
        *torchrun,
        "--device=cpu",
        "--quick",
        "--step-sizes",
        "32",
        "32",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = result_rows.read_rows(tmp_path / "scale.csv")
    assert {row["status"] for row in rows} == {"measured"}
    parts = [row["part"] for row in rows]
    # Six losses at two sizes, one and two ranks, and six ways for texts and for pictures.
    assert [parts.count(part) for part in ("loss", "scaling", "step")] == [12, 2, 12]
    assert {row["towers"] for row in rows if row["part"] == "step"} == {"bert-tiny", "tiny"}
    page = launch_tables.filled("<!-- scale -->\nold\n<!-- /scale -->", tmp_path)
    assert "old" not in page
    assert all(f"| {row['method']} |" in page or f"{row['towers']}, {row['method']} |" in page for row in rows)
    assert (tmp_path / "scale_speed.png").exists()

    again = subprocess.run([*words, "--budget=0", "--keep-rows", "--parts", "loss"], env=environment, timeout=120)
    assert again.returncode == 0
    rows = result_rows.read_rows(tmp_path / "scale.csv")
    assert {row["status"] for row in rows if row["part"] == "loss"} == {"no time left"}
    assert [row["part"] for row in rows].count("step") == 12


def test_the_page_shows_the_committed_results() -> None:
    page = launch_tables.README.read_text(encoding="utf-8")
    assert launch_tables.filled(page, SCRIPTS / "results") == page
