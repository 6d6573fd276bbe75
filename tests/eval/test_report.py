"""Report files agree, escape text from data, and omit plots without matplotlib."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from report_helpers import BEFORE, QRELS, rows, whole_report

from eval.metrics import Metrics, evaluate_run
from eval.ranking import RankedRun
from eval.reports.files import write
from eval.reports.markdown import comparison_table
from eval.reports.report import Report, ReportSet
from index.files import InputError

FILES = ["report.html", "report.json", "report.md", "report.png"]


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


def test_shallow_runs_are_shown_at_the_deepest_cut_off_there_is(tmp_path: Path) -> None:
    qrels = {"q": {"a": 1}, "p": {"b": 1}}
    shallow = evaluate_run(qrels, {"q": {"a": 1.0}, "p": {"a": 2.0, "b": 1.0}}, (1, 3))
    table = comparison_table({"m": shallow}).splitlines()
    assert table[0] == "| model | nDCG@3 | recall@3 | MRR@3 | MAP@3 | precision@3 |"
    assert table[2].startswith("| m | 0.8155 | 1.0000 | 0.7500 |")
    written = write(tmp_path, Report("toy", [ReportSet("toy", {"m": shallow})], {}, measure="ndcg@3"))
    assert sorted(path.name for path in written) == FILES
    assert table[0].replace("model", "system") in (tmp_path / "report.md").read_text()
    assert "<th>recall@3</th>" in (tmp_path / "report.html").read_text()


def test_report_files_agree(tmp_path: Path) -> None:
    written = write(tmp_path / "out", Report("toy, test split", [ReportSet("toy", rows())], {"model": "m"}))
    assert sorted(path.name for path in written) == FILES
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["sets"].values()
    assert found["systems"]["before"] == {"mean": rows()["before"].mean, "missing_queries": ["q3"]}
    assert found["queries"] == 3
    text = (tmp_path / "out" / "report.md").read_text()
    assert comparison_table(rows(), head="system") in text and "- model: m" in text
    assert "| at k = | 1 | 3 | 5 | 10 | 100 | 1000 |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    for line in (text, page):
        assert "before: 1 of 3 queries got no passage and count as 0: q3" in line
        assert "0.5436" in line and "0.6667" in line
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_sets_have_one_row_each_and_parts_of_a_set_share_one(tmp_path: Path) -> None:
    runs = {"minilm": RankedRun.of(BEFORE)}
    sets = [
        ReportSet("one", {"minilm": rows()["before"]}, runs=runs, qrels=QRELS),
        ReportSet("forums/a", {"minilm": rows()["before"]}, row="forums"),
        ReportSet("forums/b", {"minilm": rows()["after"]}, row="forums"),
    ]
    write(tmp_path, Report("toy", sets, {}))
    text = (tmp_path / "report.md").read_text()
    assert "| one | 3 | 0.5436 |\n| forums (mean of 2) | 6 | 0.7718 |\n| mean of 2 sets |  | 0.6577 |" in text
    page = (tmp_path / "report.html").read_text()
    assert "scores that minilm gives" in page and page.count("<svg") == 5


def test_everything_that_comes_from_data_is_escaped(tmp_path: Path) -> None:
    write(tmp_path, whole_report())
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<b>before" not in page and "p<i>" not in page and "one <&>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    # A dollar sign in a plot is text, not math.
    assert "$x$" in page
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text and "\n# heading" not in text and "[x](" not in text


def test_control_characters_reach_no_report(tmp_path: Path) -> None:
    report = dataclasses.replace(whole_report(), title="a\x1b[31m\0\x85\u202eb ~~c~~")
    write(tmp_path, report)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "a\ufffd[31m" in text.replace("\\[", "[")
        assert (
            not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
            and "\u202e" not in text
        )
    assert "~~c~~" not in (tmp_path / "report.md").read_text()


def test_a_page_has_no_scripts_or_external_resources(tmp_path: Path) -> None:
    write(tmp_path, whole_report())
    page = (tmp_path / "report.html").read_text()
    for loading in ("src=", "url(http", "@import", "<link", "<iframe", "<script", "javascript:y)<"):
        assert loading not in page.replace('src="data:', ""), loading
    assert "default-src 'none'" in page


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    write(tmp_path / "one", whole_report())
    write(tmp_path / "two", whole_report())
    for name in FILES[:3]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_missing_sets_have_a_row(tmp_path: Path) -> None:
    write(tmp_path, whole_report())
    assert "| robust04 |  | not here | not here |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["absent"] == ["robust04"]
    # A system that is missing on one set has no mean.
    assert "| mean of 2 sets |  | – | 1.0000 |" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_a_warning_is_logged_and_plots_are_omitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        written = write(tmp_path, Report("toy", [ReportSet("toy", rows())], {}))
    assert sorted(path.name for path in written) == FILES[:3]
    assert caplog.text.count('pip install "dense-retriever[plot]"') == 1
    assert "report.png" not in (tmp_path / "report.md").read_text()
    assert "<svg" not in (tmp_path / "report.html").read_text()


def test_an_empty_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one result"):
        write(tmp_path, Report("toy", [], {}))
