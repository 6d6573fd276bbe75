"""Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP: finish and save the current work, then exit."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# Signals that ask a program to end. Windows has no SIGHUP.
TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# Seconds after a Ctrl-C within which another SIGINT is the same request: a terminal sends it to torchrun and to its
# ranks, and torchrun passes it on.
SAME_REQUEST = 3.0
# Seconds after which a KeyboardInterrupt that a callback could not pass on is raised again.
RETRY = 0.05


class Interrupted(Exception):
    """A signal asked the program to stop; `str(error)` is the name of the signal.

    Attributes:
        run: Folder of the training run that was interrupted, or None.
        step: Its last step, of which a checkpoint was saved.
    """

    run: Path | None = None
    step: int = 0


class StopRequest:
    """Context that records SIGINT, SIGTERM and SIGHUP as a request to stop.

    All of them are one request, however many come: a batch system sends SIGTERM to torchrun and to its ranks, and
    torchrun passes it on. Only a second Ctrl-C, some seconds after the first, has its previous effect and ends the
    process without a checkpoint. A signal that the process ignores (nohup) remains ignored.

    Args:
        any_rank: for several ranks, which must stop after the same step: a collective that returns whether its argument
            is true on any rank. A signal then takes effect at the next `sync`. Default: None, a single process.
    """

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        self._signal: str | None = None
        self._first_sigint: float | None = None
        self._any_rank = any_rank
        self._requested_on_any_rank = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set signal handlers. A trainer in another thread is stopped by its program.
        if threading.current_thread() is threading.main_thread():
            self._handlers = _handle((signal.SIGINT, *TERMINATION), self._record)
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
        self._signal = self._signal or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_sigint is None:
            self._first_sigint = now
        elif now - self._first_sigint > SAME_REQUEST:
            self._restore_handlers()
            signal.raise_signal(signal.SIGINT)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _handle(numbers: tuple[int, ...], handler: Any) -> dict[int, Any]:
    """Set the handler of signals that are not ignored. Returns their previous handlers."""
    # nohup ignores SIGHUP, a shell SIGINT of its background jobs.
    numbers = tuple(number for number in numbers if signal.getsignal(number) != signal.SIG_IGN)
    return {number: signal.signal(number, handler) for number in numbers}


@contextlib.contextmanager
def default_signal_handlers() -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP end the process at once, for waits outside Python without cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handle((signal.SIGINT, *TERMINATION), signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, so that temporary files are removed.

    A signal that arrives within a callback of a library in C, or while an object is deleted, cannot raise there: Python
    would print and drop it. It is raised again shortly after.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handle(TERMINATION, signal.default_int_handler)
    hook = sys.unraisablehook

    def raise_again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(RETRY, signal.raise_signal, [signal.SIGINT]).start()
        else:
            hook(unraisable)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            # A rank that exits because another one failed ignores SIGTERM until it has exited (distributed/errors.py).
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
