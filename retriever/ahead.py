"""Work that is done while its results are waited for elsewhere: an iterator in a thread of its own."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds after which a thread that computes in Python lets another have the lock. Each operation of torch gives the
# lock up and takes it again: beside such a thread 300 of them a second begin at Python's 5 ms, 30,000 at this.
SWITCH_INTERVAL = 2e-5


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Within, threads that compute in Python do not hold up the one that launches a GPU's kernels."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
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
