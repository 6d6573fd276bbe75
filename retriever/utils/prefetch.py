"""A prefetching iterator and a bounded queue of background calls, each with one thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

# Seconds after which a thread that runs Python code offers the GIL to other threads. Each torch operation releases and
# reacquires it: next to such a thread, 300 operations per second start at Python's default of 5 ms, 30,000 at this.
SWITCH_INTERVAL = 2e-5


@contextlib.contextmanager
def short_switch_interval() -> Iterator[None]:
    """Context in which threads that run Python code do not delay the thread that launches GPU kernels."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield the items in order; a background thread computes up to `depth` of them in advance.

    An exception of the iterator is raised after the items before it. Closing the generator ends the thread after the
    current item.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            if all(put("item", item) for item in items):
                put("end", None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consuming thread
            put("error", error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()


@contextlib.contextmanager
def background_calls(
    call: Callable[P, None], max_waiting: int, *, abandon: bool = False
) -> Iterator[Callable[P, None]]:
    """Context with a function that runs `call` in a background thread, in order, and returns at once.

    An exception of a call is raised by the next call or at the end of the context, and later calls are dropped.

    Args:
        call: the function to run in the background.
        max_waiting: calls in the queue; further calls block.
        abandon: if the body raises, do not wait for the calls made so far, which might never return. Default: False.
    """
    ready: queue.Queue[Callable[[], None] | None] = queue.Queue(max_waiting)
    errors: list[BaseException] = []

    def work() -> None:
        while (task := ready.get()) is not None:
            if not errors:
                try:
                    task()
                except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
                    errors.append(error)

    def submit(*args: P.args, **kwargs: P.kwargs) -> None:
        if errors:
            raise errors[0]
        ready.put(partial(call, *args, **kwargs))

    thread = threading.Thread(target=work, name="background_calls", daemon=True)
    thread.start()
    try:
        yield submit
    except BaseException as error:
        if abandon:
            errors.append(error)
            with contextlib.suppress(queue.Full):
                ready.put_nowait(None)
            atexit.register(_exit_without, thread)
            raise
        ready.put(None)
        thread.join()
        raise
    ready.put(None)
    thread.join()
    if errors:
        raise errors[0]


def _exit_without(thread: threading.Thread) -> None:
    # A thread that is in a collective while the interpreter shuts down would abort the process.
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
