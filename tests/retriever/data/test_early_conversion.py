"""Sources that another process converts meanwhile are the same as those that are converted when they are opened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.data import table
from retriever.data.early_conversion import converting
from retriever.data.table import open_source


@pytest.fixture(autouse=True)
def as_before_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def pairs(path: Path, rows: int) -> SourceConfig:
    lines = (json.dumps({"query": f"q {i}", "positive": f"p {i}"}) for i in range(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceConfig(str(path))


def test_an_early_conversion_equals_one_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pairs(tmp_path / "a.jsonl", 50), pairs(tmp_path / "b.jsonl", 30)
    expected = [open_source(source, tmp_path / "late") for source in (first, second)]
    with converting((first, second), open_source):
        # Nothing is left to convert here.
        monkeypatch.setattr(table, "read_examples", None)
        found = [open_source(source, tmp_path / "early") for source in (first, second)]
    assert [each.sha256 for each in found] == [each.sha256 for each in expected]
    assert sorted(path.name for path in (tmp_path / "early").iterdir()) == sorted(
        path.name for path in (tmp_path / "late").iterdir()
    )


def test_a_source_that_cannot_be_read_is_refused_on_opening(tmp_path: Path) -> None:
    good, bad = pairs(tmp_path / "a.jsonl", 5), pairs(tmp_path / "b.jsonl", 5)
    Path(bad.path).write_text("{\n", encoding="utf-8")
    with converting((good, bad), open_source):
        assert len(open_source(good, tmp_path / "cache")) == 5
        with pytest.raises(InputError, match=r"b\.jsonl:1"):
            open_source(bad, tmp_path / "cache")
    with converting((SourceConfig(str(tmp_path / "none.jsonl")),), open_source):
        pass
