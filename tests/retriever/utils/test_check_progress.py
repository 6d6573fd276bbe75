"""A bar is there while bytes are checked, from the first to the last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from index.manifest import read_manifest
from index.store.reader import EmbeddingStore
from retriever.cli.terminal import Terminal
from retriever.utils.check_progress import MIB, byte_progress, checksum_progress


class Bars(Terminal):
    """Notes what happens to bars."""

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
    bars = Bars()
    with byte_progress(bars, "corpus", 5 * MIB + 7) as checked:
        assert bars.events == []
        for count in (MIB // 2, MIB // 2 + 1, 3 * MIB, MIB + 5):
            checked(count)
            assert bars.events[-1] != "closed"
        checked(1)
        assert bars.events == [("check corpus", 5, "MiB"), 0, 1, 3, 1, 0, "closed"]
    assert bars.events[-1] == "closed" and bars.events.count("closed") == 1


def test_a_bar_that_ends_early_is_closed_and_one_without_bytes_not_shown() -> None:
    bars = Bars()
    with contextlib.suppress(OSError), byte_progress(bars, "corpus", 100) as checked:
        checked(50)
        raise OSError
    assert bars.events == [("check corpus", 0, "MiB"), 0, "closed"]
    with byte_progress(bars, "corpus", 0), checksum_progress(bars, [Path("not-there")]):
        pass
    assert len(bars.events) == 3


def test_all_bytes_of_a_store_are_counted(world: Any) -> None:
    bars, counted = Bars(), 0
    store = EmbeddingStore.open(world.embeddings)

    def count(some: int) -> None:
        nonlocal counted
        counted += some
        checked(some)

    with checksum_progress(bars, [world.embeddings]) as checked:
        store.check(count)
        assert counted == read_manifest(world.embeddings).size and bars.events[-1] == "closed"
