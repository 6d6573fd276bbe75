"""Where an index is searched: on the GPU of the model if that is possible, or where the caller says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import retriever
from index.ann.index import Index
from index.progress import Reporter
from retriever.errors import ConfigError
from retriever.utils.indexes import place_index


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


class Moved:
    """Stands in for an index, and notes where it is moved to."""

    def __init__(self) -> None:
        self.to_device: list[tuple[str, bool, str]] = []

    def to(self, device: str, *, spread: str, note: Any, optional: bool = False) -> None:
        self.to_device.append((device, optional, spread))


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        ("cpu", "auto", []),
        ("cuda:1", "auto", [("cuda:1", True, "auto")]),
        ("cuda", "cpu", [("cpu", False, "auto")]),
        ("cpu", "cuda", [("cuda", False, "auto")]),
        ("cuda:0", "cuda:3", [("cuda:3", False, "auto")]),
    ],
)
def test_an_index_follows_the_model_unless_told_otherwise(model: str, asked: str, expected: list) -> None:
    index: Any = Moved()
    place_index(index, torch.device(model), Reporter(), index_device=asked)
    assert index.to_device == expected


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "mps", "cuda:100", 0])
def test_other_devices_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"index_device: expected auto, cpu or cuda\[:number\], found"):
        place_index(Moved(), torch.device("cpu"), Reporter(), index_device=wrong)
    wrong_spread: Any = "copies"
    with pytest.raises(ConfigError, match="index_spread: expected"):
        place_index(Moved(), torch.device("cpu"), Reporter(), index_spread=wrong_spread)
