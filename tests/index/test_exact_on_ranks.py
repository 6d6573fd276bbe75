"""Exact search by several real processes, and the thread that brings vectors to a GPU."""

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


def test_one_two_and_four_ranks_find_the_same_bytes_with_any_block_size(rng, tmp_path: Path) -> None:
    check_ranks(rng, tmp_path, (1, 2, 4), "cpu")


def filled_ahead(shards: windows.Shards, block_rows: int, rows: int) -> Iterator[windows.Piece]:
    stop = threading.Event()
    copy = windows.HostCopy(CPU, stop)
    return windows.prefetch(lambda: windows._WindowFiller(copy, block_rows, rows).fill(shards), stop, CPU)


def test_windows_filled_ahead_bring_every_row_once_and_in_order(rng, monkeypatch) -> None:
    monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", 200)
    vectors = rng.standard_normal((101, 3)).astype(np.float32)
    seen, current = [], None
    for piece in filled_ahead([(0, vectors[:40]), (40, vectors[40:])], 7, 101):
        if current is not None and current is not piece.window:
            current.release()
        current = piece.window
        assert piece.first == sum(map(len, seen))
        seen.append(piece.vectors.clone().numpy())
    np.testing.assert_array_equal(np.concatenate(seen), vectors)


def test_a_fault_while_filling_ahead_is_raised_where_pieces_are_taken(rng) -> None:
    def shards() -> Iterator[tuple[int, np.ndarray]]:
        yield 0, np.ones((5, 3), np.float32)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(filled_ahead(shards(), 2, 50))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("taken", [1, 2])
def test_the_thread_ends_when_nobody_takes_its_pieces(monkeypatch, taken: int) -> None:
    """Whether it waits for a place in the queue or for a window."""
    monkeypatch.setitem(windows.WINDOW_BYTES, "cpu", 24)
    stream = filled_ahead([(0, np.ones((100, 3), np.float32))], 1 if taken == 1 else 2, 100)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert "vectors" not in [thread.name for thread in threading.enumerate()]
