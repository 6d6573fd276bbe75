"""Start and end data loading worker processes, and end a process together with its parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import util
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from retriever.utils.torchrun import local_world_size

TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# With short texts a worker of `retriever train` prepares some 16,000 pairs/s, and an H200 takes 130,000 of MiniLM.
# Other processors are left for launching kernels and copying.
MAX_DATA_WORKERS, RESERVED_PROCESSORS = 12, 4


def data_workers(setting: int | None, device: str, steps: int | None = None) -> int:
    """The number of worker processes that prepare training batches.

    Args:
        setting: The configured number; None: chosen here.
        device: Type of the device. A CPU is busy with the towers, so one worker prepares the next batch there.
        steps: Number of steps of the run, each of which is prepared by one worker. Default: None, unknown.

    Returns:
        `setting` or, on a GPU, all but 4 of the processors of this process, from 1 to 12.
    """
    if setting is not None:
        return setting
    if device != "cuda":
        return 1
    count = min(MAX_DATA_WORKERS, processors() - RESERVED_PROCESSORS)
    return max(1, count if steps is None else min(count, steps))


def processors() -> int:
    """The processors that each process on this machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // local_world_size())


def init_worker(worker: int) -> None:
    """Initialize a worker process; the `worker_init_fn` of a DataLoader.

    Workers ignore SIGINT and SIGTERM, which reach the whole process group: the parent ends its workers. They exit by
    themselves if the parent is gone. The thread pool of tokenizers is switched off, because a fork does not have its
    threads and would wait for them forever.
    """
    for number in TERMINATION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # torch's own check for the parent then blocks on the queue of results, which is no longer read.
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    threading.Thread(target=_exit_after, args=(parent.pid, threading.Event()), daemon=True).start()


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return the iterator of a DataLoader, which starts its workers.

    Termination signals are delayed until all workers have been initialized. The workers end with the iterator, and at
    exit: a traceback may keep the iterator until then, and multiprocessing would wait forever for workers that ignore
    its SIGTERM.
    """
    iterator = _started(loader)
    if workers := getattr(iterator, "_workers", []):
        util.Finalize(iterator, _kill, (workers,), exitpriority=0)
    return iterator


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, frame: received.append(signum)) for number in TERMINATION_SIGNALS
    }
    try:
        return iter(loader)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signum in received:
            signal.raise_signal(signum)


@contextlib.contextmanager
def exit_with_parent() -> Iterator[None]:
    """Context in which this process exits if its parent is gone, even while it waits outside Python."""
    done = threading.Event()
    threading.Thread(target=_exit_after, args=(os.getppid(), done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _exit_after(parent: int, done: threading.Event) -> None:
    while not done.wait(1):
        if os.getppid() != parent:
            os._exit(1)
