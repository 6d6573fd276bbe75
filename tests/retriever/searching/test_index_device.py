"""A device for an index is refused where there is no index that it could apply to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import retriever
from index.ann.index import Index
from retriever.errors import ConfigError


@pytest.mark.parametrize("option", [{"index_device": "cpu"}, {"index_spread": "shards"}])
def test_options_of_an_index_are_not_ignored(option: dict[str, Any], tmp_path: Path) -> None:
    (name, value), out = *option.items(), tmp_path / "out.jsonl"
    message = f"{name}: expected together with an index, found {value} without one"
    with pytest.raises(ConfigError, match=message):
        retriever.mine("model", "pairs.jsonl", out, **option)
    with pytest.raises(ConfigError, match=message):
        retriever.evaluate("model", ["scifact"], **option)
    with pytest.raises(ConfigError, match=r"move an opened index by Index\.to"):
        retriever.search("model", Index.__new__(Index), "query", **option)
    assert not out.exists()
