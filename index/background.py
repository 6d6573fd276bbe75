"""Tasks that run in background threads while the caller works."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from index.files import HASH_THREADS


class BackgroundTasks:
    """A context manager that runs tasks in background threads. Leaving the block waits for all of them.

    If the block raises a ValueError or RuntimeError, an error of a task takes precedence: a damaged file that a task
    finds is often the cause of what went wrong in the block. On any other exception the tasks that have not started are
    cancelled.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1), "background")
        self._tasks: list[Future[Any]] = []

    def __enter__(self) -> BackgroundTasks:
        return self

    def submit(self, task: Callable[..., object], *arguments: object) -> None:
        """Run `task(*arguments)` as soon as a thread is free."""
        self._tasks.append(self._executor.submit(task, *arguments))

    def raise_failures(self) -> None:
        """Raise the error of a task that has already failed, without waiting."""
        for task in self._tasks:
            if task.done():
                task.result()

    def wait(self) -> None:
        """Wait for all tasks; raise the error of the first that failed."""
        for task in self._tasks:
            task.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, ValueError | RuntimeError):
                self.wait()
        finally:
            self._executor.shutdown(cancel_futures=True)
