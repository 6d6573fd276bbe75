"""bench_exact.py writes its rows to the given folder with the given commit, and stops at a wrong result."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks.index import bench_exact

pytest.importorskip("faiss")
pytest.importorskip("beir")

SMALL = ("--rows", "3000", "--dim", "16", "--queries", "40", "--k", "5", "--repeats", "1", "--commit", "abc1234")


def test_rows_replace_earlier_ones_in_the_given_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        monkeypatch.setattr(
            sys, "argv", ["bench_exact.py", *SMALL, "--results", str(tmp_path / "new"), "--profile", "ours"]
        )
        bench_exact.main()
    with (tmp_path / "new" / "exact.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 7 and {row["commit"] for row in rows} == {"abc1234"}
    assert {row["method"]: row["of_bare"] for row in rows}["bare float32 product and top-k"] == "1.000"
    told = capsys.readouterr()
    assert "blocks of 5000: the same bits" in told.err and "aten::mm" in told.out


def test_profiling_an_unknown_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_exact.py", *SMALL, "--profile", "theirs"])
    with pytest.raises(SystemExit, match=r"--profile: expected some of 'bare float32 product', .*, found 'theirs'"):
        bench_exact.main()


def test_a_single_different_bit_is_refused() -> None:
    scores, rows = np.zeros((2, 3), np.float32), np.arange(6).reshape(2, 3)
    bench_exact.compare("blocks", (scores.copy(), rows), (scores, rows))
    with pytest.raises(SystemExit, match="expected the bits"):
        bench_exact.compare("blocks", (-scores, rows), (scores, rows))


def test_only_a_tie_with_the_last_score_may_differ() -> None:
    scores, rows = np.array([[3.0, 2.0]], np.float32), np.array([[7, 4]])
    truth = np.array([0]), (scores, rows)
    bench_exact.check("ours", (scores, np.array([[7, 9]])), truth, 2)
    with pytest.raises(SystemExit, match="of the passages of float64"):
        bench_exact.check("ours", (scores, np.array([[9, 4]])), truth, 2)
    with pytest.raises(SystemExit, match="expected the scores of float64"):
        bench_exact.check("ours", (scores + 1, rows), truth, 2)
