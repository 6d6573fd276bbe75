"""Work in a thread of its own: an iterator that is ahead of who takes from it, calls that are behind who makes them."""

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

# Seconds after which a thread that computes in Python lets another have the lock. Each operation of torch gives the
# lock up and takes it again: beside such a thread 300 of them a second begin at Python's 5 ms, 30,000 at this.
SWITCH_INTERVAL = 2e-5


@contextlib.contextmanager
def short_switch_interval() -> Iterator[None]:
    """Within, threads that compute in Python do not hold up the one that launches a GPU's kernels."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The items in order, made by a thread that is up to `depth` of them ahead; what it raises is raised here.

    Closing the iterator ends the thread after the item that it is at.
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

    def make() -> None:
        try:
            if all(put("item", item) for item in items):
                put("end", None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the items are taken
            put("error", error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
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
def background_calls(call: Callable[P, None], most: int, *, abandon: bool = False) -> Iterator[Callable[P, None]]:
    """Within, what is called comes back at once; a thread makes the calls, in order, of which `most` wait at a time.

    What a call raises is raised by the next one or at the end, and ends those behind it. An error of the body waits for
    the calls made so far, unless `abandon`: they may then never come back.
    """
    ready: queue.Queue[Callable[[], None] | None] = queue.Queue(most)
    failed: list[BaseException] = []

    def make() -> None:
        while (each := ready.get()) is not None:
            if not failed:
                try:
                    each()
                except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where calls are made
                    failed.append(error)

    def later(*args: P.args, **kwargs: P.kwargs) -> None:
        if failed:
            raise failed[0]
        ready.put(partial(call, *args, **kwargs))

    thread = threading.Thread(target=make, name="behind", daemon=True)
    thread.start()
    try:
        yield later
    except BaseException as error:
        if abandon:
            failed.append(error)
            with contextlib.suppress(queue.Full):
                ready.put_nowait(None)
            atexit.register(_end_beside, thread)
            raise
        ready.put(None)
        thread.join()
        raise
    ready.put(None)
    thread.join()
    if failed:
        raise failed[0]


def _end_beside(thread: threading.Thread) -> None:
    # A thread that is in a transfer when Python takes itself apart ends the program by an abort.
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
