"""Worker processes end with the process that started them."""

from __future__ import annotations

import multiprocessing
from typing import Any

from torch.utils.data import DataLoader

from retriever.utils.workers import init_worker, start_workers


def test_a_process_ends_although_something_keeps_the_iterator_of_its_workers() -> None:
    """As the traceback of an exception does, which ends a program. Workers ignore the SIGTERM of multiprocessing."""
    kept: list[Any] = []

    def work() -> None:
        numbers: Any = range(1000)
        kept.append(start_workers(DataLoader(numbers, batch_size=None, num_workers=1, worker_init_fn=init_worker)))
        next(kept[0])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
