"""The CSV of the baselines has a row for each set and system of the report."""

from __future__ import annotations

import csv
from pathlib import Path

from scripts.benchmarks.eval import bench_baselines


def test_rows_equal_the_report(tmp_path: Path) -> None:
    mean = {"ndcg@10": 0.5, "recall@100": 0.75, "mrr@10": 0.4, "map@100": 0.3}
    pair = dict.fromkeys(("low", "high", "wins", "losses", "ties", "p_t", "p_randomisation"), 0)
    pairs = [{"a": "one", "b": "two", "difference": 0.125, "p_corrected": 0.03, **pair}]
    systems = {"one": {"mean": mean}, "two": {"mean": mean}}
    report = {"sets": {"toy": {"queries": 7, "systems": systems, "comparisons": pairs}}}
    bench_baselines.write_csv(tmp_path / "rows.csv", report)
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["set"], row["system"], row["queries"], row["difference"]) for row in rows] == [
        ("toy", "one", "7", ""),
        ("toy", "two", "7", "0.125"),
    ]
    assert (rows[1]["ndcg@10"], rows[1]["p_corrected"]) == ("0.500000", "0.03") and rows[1]["commit"]
