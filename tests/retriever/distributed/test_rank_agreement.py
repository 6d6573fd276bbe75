"""Checks that ranks agree: compared fields, messages, and folders."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.distributed import agreement as rank_agreement
from retriever.distributed.agreement import (
    RanksDifferError,
    check_same_folder,
    compared_settings,
    describe_difference,
    flat_settings,
)
from retriever.distributed.ranks import Ranks


def test_the_message_names_values_ranks_and_further_fields() -> None:
    def reports(*values: Any) -> list[dict[str, tuple[str, str]]]:
        return [{"lr": (str(value), str(value)), "same": ("1", "1")} for value in values]

    assert describe_difference(reports(1, 1, 1)) == ""
    assert describe_difference(reports(1, 2)) == "lr differs between ranks: 1 on rank 0, 2 on rank 1"
    many = [3, 2, 2, 3, 2, 2, 2]
    assert describe_difference(reports(*many)) == "lr differs between ranks: 3 on ranks 0 and 3, 2 on ranks 1-2 and 4-6"
    assert describe_difference(reports(*[0, 1] * 9)).endswith(", 1 on ranks 1 and 3 and 5 and 7 and others")
    assert describe_difference(reports(*range(9))).endswith("2 on rank 2, 3 on rank 3, and 5 more")
    missing = [{"a": ("1", "1"), "b": ("2", "2")}, {}]
    assert describe_difference(missing) == "a differs between ranks: 1 on rank 0, none on rank 1 (so do b)"


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)), min_size=1, max_size=5))
def test_a_difference_is_described_if_and_only_if_fields_differ(fields: list[dict[str, int]]) -> None:
    reports = [{name: (str(value), str(value)) for name, value in one.items()} for one in fields]
    found = describe_difference(reports)
    assert bool(found) == any(one != fields[0] for one in fields)
    for name in "abcd":
        differs = len({one.get(name) for one in fields}) > 1
        assert differs == bool(re.search(rf"(^|do |, ){name}( differs|,|\)|$)", found)), found


class ThreadRanks(Ranks):
    """Ranks that are threads of this process and exchange values through a list."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: list[Any]) -> None:
        super().__init__(rank, barrier.parties)
        object.__setattr__(self, "_exchange", (barrier, values))

    @property
    def group(self) -> Any:
        return "threads"

    def all_gather(self, value: Any) -> list[Any]:
        barrier, values = self._exchange  # type: ignore[attr-defined]
        values[self.rank] = json.dumps(value)
        barrier.wait(10)
        gathered = [json.loads(text) for text in values]
        barrier.wait(10)
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def barrier(self) -> None:
        self.all_gather(None)


def compare_folders(*folders: Path, compare: Callable[..., None] = check_same_folder) -> list[str]:
    """Run `check_same_folder` on each rank. Returns its errors, empty where it passes."""
    barrier, values = threading.Barrier(len(folders)), [None] * len(folders)
    errors = ["not finished"] * len(folders)

    def on_rank(rank: int) -> None:
        try:
            compare(ThreadRanks(rank, barrier, values), "out", folders[rank])
            errors[rank] = ""
        except RanksDifferError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return errors


def test_different_paths_of_one_folder_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    for name in ("there", "new", "there/new/one"):
        same = (tmp_path / "disk" / name, tmp_path / "link" / name, Path("disk") / name)
        assert compare_folders(*same) == ["", "", ""], name
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link", "there"]


def test_messages_show_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path.resolve()
    line = f"out differs between ranks: {here}/run on rank 0, {here}/other on rank 1"
    assert compare_folders(Path("run"), Path("other")) == [line, line]


def test_different_folders_are_refused_on_every_rank(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other, new = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for differing in ((one, other), (one, new), (new, one), (new, tmp_path / "d"), (one / "new", other / "new")):
        line = f"out differs between ranks: {differing[0]} on rank 0, {differing[1]} on rank 1"
        assert compare_folders(*differing) == [line, line]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]


def test_the_same_path_on_two_file_systems_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rank_agreement._becomes_visible
    # As on two machines with separate file systems.
    here = threading.local()
    monkeypatch.setattr(rank_agreement, "_becomes_visible", lambda file, *, wait: seen(file, wait=False) and here.first)

    def compare_first(ranks: Ranks, name: str, folder: Path) -> None:
        here.first = ranks.is_first
        check_same_folder(ranks, name, folder)

    other = f"{tmp_path}, another folder on {socket.gethostname()},"
    line = f"out differs between ranks: {tmp_path} on rank 0, {other} on rank 1"
    assert compare_folders(tmp_path, tmp_path, compare=compare_first) == [line, line]


def test_paths_are_compared_if_the_folder_is_not_writable(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    assert compare_folders(file, file) == ["", ""]
    assert all("out differs" in line for line in compare_folders(file, tmp_path / "new"))


def test_all_settings_are_compared_except_paths_and_resources() -> None:
    source = SourceConfig(path="a")
    config = TrainConfig(data=DataConfig(sources=(source, source)), model=ModelConfig(architecture={"layers": 2}))
    fields = compared_settings(config)
    assert fields["model.architecture.layers"] == 2 and fields["data.sources[1].query"] == "query"
    elsewhere = dataclasses.replace(
        config,
        out="b",
        device="cuda:1",
        data=DataConfig(sources=(dataclasses.replace(source, path="b"), source), workers=3, cache="c"),
        dev=DevConfig(path="d"),
        model=dataclasses.replace(config.model, tokenizer="t"),
    )
    assert compared_settings(elsewhere) == fields
    left_out = {"out", "device", "model.name", "model.tokenizer", "model.image.name", "dev.path", "dev.paths"}
    left_out |= {"data.workers", "data.cache"}
    plain = {name for name in flat_settings(TrainConfig())}
    assert plain - compared_settings(TrainConfig()).keys() == left_out
