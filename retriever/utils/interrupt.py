"""Handle SIGINT (Ctrl-C) and SIGTERM: finish and save the current work, then exit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked the program to stop; `str(error)` is the name of the signal.

    Attributes:
        run: Folder of the training run that was interrupted, or None.
        step: Its last step, of which a checkpoint was saved.
    """

    run: Path | None = None
    step: int = 0


class StopRequest:
    """Context that records the first SIGINT or SIGTERM. A second signal has its previous effect.

    Args:
        any_rank: for several ranks, which must stop after the same step: a collective that returns whether its argument
            is true on any rank. A signal then takes effect at the next `sync`. Default: None, a single process.
    """

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        self._signal: str | None = None
        self._any_rank = any_rank
        self._requested_on_any_rank = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set signal handlers. A trainer in another thread is stopped by its program.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore_handlers()

    @property
    def requested(self) -> bool:
        """Whether a signal was received, by any rank as of the last `sync`."""
        return self._signal is not None if self._any_rank is None else self._requested_on_any_rank

    def sync(self) -> None:
        """Learn of signals to other ranks. Every rank must call it."""
        if self._any_rank is not None:
            self._requested_on_any_rank = self._any_rank(self._signal is not None)

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.requested:
            raise Interrupted(self._signal or "signal to another process")

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


@contextlib.contextmanager
def default_signal_handlers() -> Iterator[None]:
    """Context in which SIGINT and SIGTERM end the process at once, for waits outside Python without cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt as SIGINT does, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # A rank that exits because another one failed ignores SIGTERM until it has exited (distributed/errors.py).
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)
