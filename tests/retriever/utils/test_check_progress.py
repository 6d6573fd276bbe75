"""The progress bar of checksums is shown from the first to the last byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from index.manifest import read_manifest
from index.store.reader import EmbeddingStore
from retriever.cli.terminal import Terminal
from retriever.utils.check_progress import MIB, byte_progress, checksum_progress


class RecordingReporter(Terminal):
    """Records the events of progress reporter."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[object] = []

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        self.events.append((what, total, unit))
        try:
            yield self.events.append
        finally:
            self.events.append("closed")


def test_bytes_are_counted_in_whole_mebibytes() -> None:
    reporter = RecordingReporter()
    with byte_progress(reporter, "corpus", 5 * MIB + 7) as checked:
        assert reporter.events == []
        for count in (MIB // 2, MIB // 2 + 1, 3 * MIB, MIB + 5):
            checked(count)
            assert reporter.events[-1] != "closed"
        checked(1)
        assert reporter.events == [("check corpus", 5, "MiB"), 0, 1, 3, 1, 0, "closed"]
    assert reporter.events[-1] == "closed" and reporter.events.count("closed") == 1


def test_an_interrupted_bar_is_closed_and_zero_bytes_show_none() -> None:
    reporter = RecordingReporter()
    with contextlib.suppress(OSError), byte_progress(reporter, "corpus", 100) as checked:
        checked(50)
        raise OSError
    assert reporter.events == [("check corpus", 0, "MiB"), 0, "closed"]
    with byte_progress(reporter, "corpus", 0), checksum_progress(reporter, [Path("not-there")]):
        pass
    assert len(reporter.events) == 3


def test_all_bytes_of_a_store_are_counted(world: Any) -> None:
    reporter, counted = RecordingReporter(), 0
    store = EmbeddingStore.open(world.embeddings)

    def count(number: int) -> None:
        nonlocal counted
        counted += number
        checked(number)

    with checksum_progress(reporter, [world.embeddings]) as checked:
        store.check(count)
        assert counted == read_manifest(world.embeddings).size and reporter.events[-1] == "closed"
