"""Ctrl-C and SIGTERM as a request: the work in hand is finished and saved, then the program ends."""

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
    """While active, the first SIGINT or SIGTERM is noted and the second one acts as it would have without us.

    Several processes that work in step must stop at the same one: with `together`, which says whether any process has
    what this one has, a signal counts from their next `agree` on.
    """

    def __init__(self, together: Callable[[bool], bool] | None = None) -> None:
        self._signal: str | None = None
        self._together = together
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; a trainer in another thread is its program's to end.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None if self._together is None else self._agreed

    def agree(self) -> None:
        """Ask the other processes for signals; every one calls it."""
        if self._together is not None:
            self._agreed = self._together(self._signal is not None)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(self._signal or "signal to another process")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


@contextlib.contextmanager
def default_signal_handlers() -> Iterator[None]:
    """Within, SIGINT and SIGTERM end the program where it stands: while it waits outside of Python, and has nothing yet
    that would have to be tidied up."""
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
    """SIGTERM raises KeyboardInterrupt, as SIGINT does: temporary files go, and the terminal gets its cursor back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # A rank that ends with the others ignores it from then on (distributed/errors.py), until it has said why.
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)
