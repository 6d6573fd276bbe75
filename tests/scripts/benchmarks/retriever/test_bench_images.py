"""bench_images.py measures its three methods on the same images and writes their rows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from scripts import ROOT

BENCHMARK = str(ROOT / "scripts/benchmarks/retriever/bench_images.py")


def test_three_methods_are_measured_and_written(tmp_path: Path) -> None:
    words = [
        sys.executable,
        BENCHMARK,
        "--results",
        str(tmp_path),
        "--commit",
        "abc",
    ]
    words += ["--images", "64", "--batch", "32", "--sides", "96", "72", "--rounds", "1", "--workers", "1"]
    subprocess.run(words, check=True, capture_output=True, text=True)
    with (tmp_path / "images.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["Pillow", "decoder", "pipeline"]
    for row in rows.values():
        assert (row["images"], row["workers"], row["commit"]) == ("64", "1", "abc") and "96 x 72" in row["data"]
        assert float(row["images_per_second"]) > 0 and float(row["processor_ms"]) > 0
    decoder, pipeline = rows["decoder"], rows["pipeline"]
    assert float(decoder["of_decoder"]) == 1
    expected = float(decoder["processor_ms"]) / float(pipeline["processor_ms"])
    assert abs(float(pipeline["of_decoder_by_processor_time"]) / expected - 1) < 0.02


def test_missing_tars_give_a_one_line_error(tmp_path: Path) -> None:
    words = [
        sys.executable,
        BENCHMARK,
        "--data",
        str(tmp_path / "none.tar"),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"bench_images: {tmp_path / 'none.tar'}: no such file\n"
