"""Exact search by several processes, and the prefetch thread for GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_on_ranks import check_ranks

from index.exact import windows

CPU = torch.device("cpu")


def test_results_do_not_depend_on_ranks_and_block_size(rng, tmp_path: Path) -> None:
    check_ranks(rng, tmp_path, (1, 2, 4), "cpu")


def prefetched(shards: windows.Shards, block_rows: int, rows: int) -> Iterator[windows.Piece]:
    stop = threading.Event()
    copy = windows.HostCopy(CPU, stop)
    return windows.prefetch(lambda: windows._WindowFiller(copy, block_rows, rows).fill(shards), stop, CPU)


def test_prefetch_yields_every_row_once_in_order(rng, monkeypatch) -> None:
    monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", 200)
    vectors = rng.standard_normal((101, 3)).astype(np.float32)
    seen, current = [], None
    for piece in prefetched([(0, vectors[:40]), (40, vectors[40:])], 7, 101):
        if current is not None and current is not piece.window:
            current.release()
        current = piece.window
        assert piece.first == sum(map(len, seen))
        seen.append(piece.vectors.clone().numpy())
    np.testing.assert_array_equal(np.concatenate(seen), vectors)


def test_prefetch_raises_errors_in_the_consumer(rng) -> None:
    def shards() -> Iterator[tuple[int, np.ndarray]]:
        yield 0, np.ones((5, 3), np.float32)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(prefetched(shards(), 2, 50))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("taken", [1, 2])
def test_the_prefetch_thread_ends_with_its_consumer(monkeypatch, taken: int) -> None:
    """Whether it waits for space in the queue or for a window."""
    monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", 24)
    stream = prefetched([(0, np.ones((100, 3), np.float32))], 1 if taken == 1 else 2, 100)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert "vectors" not in [thread.name for thread in threading.enumerate()]
