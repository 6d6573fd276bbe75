"""Reports: whole files, one number in all of them, and no plot without matplotlib."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from eval.metrics import Metrics, evaluate_run
from eval.report import comparison_table, write_report
from index.files import InputError


def rows() -> dict[str, Metrics]:
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"a": 1}}
    before = evaluate_run(qrels, {"q1": {"b": 2.0, "a": 1.0}, "q2": {"b": 1.0}})
    return {"before": before, "after": evaluate_run(qrels, {q: {d: 1.0 for d in g} for q, g in qrels.items()})}


def test_table_has_a_line_per_row() -> None:
    table = comparison_table(rows(), ("ndcg@10", "recall@100", "absent@3"))
    assert table.splitlines() == [
        "| model | nDCG@10 | recall@100 |",
        "|---|---:|---:|",
        "| before | 0.5436 | 0.6667 |",
        "| after | 1.0000 | 1.0000 |",
    ]


def test_a_measure_that_one_row_lacks_is_a_dash() -> None:
    shallow = Metrics({"ndcg@10": 0.5}, {"q": {"ndcg@10": 0.5}}, [])
    assert "| shallow | 0.5000 | – |" in comparison_table({"shallow": shallow, **rows()}, ("ndcg@10", "recall@100"))


def test_report_files_agree(tmp_path: Path) -> None:
    written = write_report(tmp_path / "out", rows(), title="toy, test split", details={"model": "m"})
    assert [path.name for path in written] == ["report.json", "report.md", "report.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md", "report.png"]
    report = json.loads(written[0].read_text())
    assert report["rows"]["before"]["mean"] == rows()["before"].mean
    assert (report["rows"]["before"]["queries"], report["rows"]["before"]["missing_queries"]) == (3, ["q3"])
    text = written[1].read_text()
    assert comparison_table(rows()) in text and "- model: m" in text
    assert "| at k = | 1 | 3 | 5 | 10 | 100 | 1000 |" in text and text.count("| nDCG | 0.") == 1
    assert "before: 1 of 3 queries got no passage and count as 0: q3" in text
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_hint_and_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        written = write_report(tmp_path, rows(), title="toy")
    assert [path.name for path in written] == ["report.json", "report.md"]
    assert 'pip install "dense-retriever[plot]"' in caplog.text
    assert "report.png" not in written[1].read_text()


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one result"):
        write_report(tmp_path, {}, title="toy")
