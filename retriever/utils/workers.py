"""Data workers, processes forked from the one that trains or encodes: how they begin, and how they end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

ENDING = (signal.SIGINT, signal.SIGTERM)


def init_worker(worker: int) -> None:
    """A DataLoader's worker_init_fn.

    Ctrl-C and a batch system's SIGTERM reach the whole process group, but it is the parent that ends its workers; when
    it is gone, they end by themselves. And a fork has none of the threads that tokenizers share out their texts among:
    where the parent has used them, a worker would wait for them for ever.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # torch looks for its parent too, but then waits for what is on its way to it, which no one takes.
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    threading.Thread(target=_end_with, args=(parent.pid, threading.Event()), daemon=True).start()


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, whose workers have begun: a signal that would end this process meanwhile, or a worker that
    is not yet one, comes afterwards."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in ENDING}
    try:
        return iter(loader)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextlib.contextmanager
def exit_with_parent() -> Iterator[None]:
    """Within, this process ends when the one that started it is gone, wherever it waits."""
    done = threading.Event()
    threading.Thread(target=_end_with, args=(os.getppid(), done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _end_with(parent: int, done: threading.Event) -> None:
    while not done.wait(1):
        if os.getppid() != parent:
            os._exit(1)
