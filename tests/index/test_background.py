"""Background tasks: all of them finish, and their error is raised in place of the block's."""

from __future__ import annotations

import threading
import time

import pytest

from index.background import BackgroundTasks
from index.files import InputError


def fail(after: threading.Event | None = None) -> None:
    if after is not None:
        after.wait(10)
    raise InputError("vectors: damaged")


def test_leaving_the_block_waits_for_all_tasks() -> None:
    done: list[int] = []
    with BackgroundTasks() as background:
        for number in range(5):
            background.submit(lambda number=number: (time.sleep(0.02), done.append(number)))
    assert sorted(done) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [RuntimeError("faiss: NaN"), InputError("a line without an end")])
def test_a_task_error_replaces_the_error_of_the_block(error: Exception) -> None:
    failed = threading.Event()
    with pytest.raises(InputError, match="vectors: damaged"), BackgroundTasks() as background:
        background.submit(fail, failed)
        failed.set()
        raise error


def test_failures_can_be_raised_within_the_block() -> None:
    with pytest.raises(InputError, match="damaged"), BackgroundTasks() as background:
        background.submit(fail)
        for _ in range(1000):
            time.sleep(0.01)
            background.raise_failures()
    with pytest.raises(InputError, match="damaged"), BackgroundTasks() as background:
        background.submit(fail)
        background.wait()


def test_an_interrupt_cancels_tasks_that_have_not_started() -> None:
    begun: list[int] = []
    with pytest.raises(KeyboardInterrupt), BackgroundTasks() as background:
        for number in range(1000):
            background.submit(lambda number=number: (begun.append(number), time.sleep(0.01)))
        raise KeyboardInterrupt
    assert len(begun) < 1000
