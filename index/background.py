"""Work that goes on in threads beside other work, and whose error counts first."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from index.files import SUMS_AT_ONCE


class Beside:
    """A `with` block beside which tasks run; those not begun are dropped when it ends early.

    Where the block fails because of something that a task finds as well, such as a damaged file, the task's error is
    the one to tell: it is raised in place of any ValueError or RuntimeError of the block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(SUMS_AT_ONCE, os.cpu_count() or 1), "beside")
        self._tasks: list[Future[Any]] = []

    def __enter__(self) -> Beside:
        return self

    def begin(self, task: Callable[..., object], *arguments: object) -> None:
        """Run `task` as soon as a thread is free."""
        self._tasks.append(self._pool.submit(task, *arguments))

    def look(self) -> None:
        """Raise what a task that has ended raised, if any did."""
        for task in self._tasks:
            if task.done():
                task.result()

    def wait(self) -> None:
        """Wait for all tasks, and raise what the first that failed raised."""
        for task in self._tasks:
            task.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, ValueError | RuntimeError):
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
