"""Progress of long operations: events for a callback, and messages for `logging`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from index.files import InputError

logger = logging.getLogger("retriever")


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a long operation.

    Attributes:
        task: What is being done, for example "encode corpus".
        done: Number of units done.
        total: Number of units in all, or None if it is not known.
        unit: What is counted, for example "passages".
        note: Further facts, for example the loss of a training step, or None.
    """

    task: str
    done: int
    total: int | None
    unit: str
    note: str | None = None


ProgressCallback = Callable[[ProgressEvent], None]


class Reporter:
    """Reports progress to a callback and messages to the logger "retriever".

    Args:
        callback: Called with a `ProgressEvent` at each step. Default: None, progress is not reported.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback

    @property
    def is_live(self) -> bool:
        """Whether progress is drawn as it changes, so that messages need not repeat it."""
        return self._callback is not None

    def line(self, text: str) -> None:
        """Report one message; a message that begins with "warning: " is logged as a warning."""
        level = logging.WARNING if text.startswith("warning: ") else logging.INFO
        logger.log(level, "%s", text.removeprefix("warning: "))

    @contextlib.contextmanager
    def bar(self, task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Report the progress of one task.

        Args:
            task: What is being done.
            total: Number of units in all, or None if it is not known.
            unit: What is counted.
            done: Number of units that were done before.

        Yields:
            `advance(count, note=None)`, to be called when `count` more units are done.
        """

        def advance(count: int, note: str | None = None) -> None:
            nonlocal done
            done += count
            if self._callback is not None:
                self._callback(ProgressEvent(task, done, total, unit, note))

        yield advance


class SilentReporter(Reporter):
    """Reports nothing: for all processes of a job but the first."""

    def line(self, text: str) -> None:
        """Do nothing."""


Progress = ProgressCallback | Reporter | None
"""What public functions take: a callback, a reporter, or None for messages to `logging` alone."""


def as_reporter(progress: Progress) -> Reporter:
    """The reporter for what a caller passed as `progress`.

    Raises:
        InputError: It is something else.
    """
    if progress is not None and not isinstance(progress, Reporter) and not callable(progress):
        raise InputError(f"progress: expected a function of one ProgressEvent, found {type(progress).__name__}")
    return progress if isinstance(progress, Reporter) else Reporter(progress)
