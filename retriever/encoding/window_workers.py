"""Prefetching of a corpus's windows by threads or by worker processes.

Threads compete with the main thread for Python's lock, which delays the launch of GPU kernels; processes do not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from index.files import InputError
from index.passages import Passage
from retriever.encoding.windows import (
    CorpusWindow,
    WindowBuilder,
    WindowSchedule,
    lazy_passages,
    read_windows,
    skip,
)
from retriever.utils.prefetch import prefetch
from retriever.utils.torchrun import local_world_size
from retriever.utils.workers import init_worker, start_workers

# Passages per piece of a window, and the number of pieces that each worker prefetches. One process takes ten seconds
# for a whole window, during which a GPU would wait at the start.
PIECE, PREFETCHED_PIECES = 4096, 4

# A worker process delivers about 200,000 tokens/s; up to six are no faster than threads. BERT-base on an H200 consumes
# 2.5 million tokens/s. Four processors are left for launching kernels, writing and copying.
MAX_WORKERS, MIN_WORKERS, RESERVED_PROCESSORS = 12, 7, 4


def workers_for(device: torch.device) -> int:
    """The default number of worker processes for a device; 0 if threads are as fast."""
    # Workers are forked, and the processors of this process must be known.
    if device.type != "cuda" or not hasattr(os, "sched_getaffinity"):
        return 0
    processors = len(os.sched_getaffinity(0)) // local_world_size()
    count = min(MAX_WORKERS, processors - RESERVED_PROCESSORS)
    return count if count >= MIN_WORKERS else 0


def corpus_windows(
    passages: Iterable[Passage], row: int, schedule: WindowSchedule, builder: WindowBuilder, workers: int = 0
) -> Generator[CorpusWindow, None, None]:
    """Yield this rank's windows of a corpus, prefetched. Close the generator to end its threads and processes.

    Args:
        passages: the whole corpus. Each worker reads it from the beginning, so with workers no item may have been
            taken from it. Of a PassageFile, rows outside the windows are not parsed.
        row: the first row to read.
        schedule: the rows of each window.
        builder: builds the windows.
        workers: number of worker processes; 0: threads of this process.

    Raises:
        InputError: a passage is invalid.
        OSError: the corpus cannot be read.
    """
    if not workers:
        rows = lazy_passages(passages)
        # In the main thread, so that Ctrl-C interrupts it.
        skip(rows, row)
        raw_windows = read_windows(rows, row, schedule.windows(row))
        with (
            contextlib.closing(prefetch(raw_windows)) as prefetched,
            contextlib.closing(prefetch(itertools.starmap(builder, prefetched))) as windows,
        ):
            yield from windows
        return
    # Nothing is written to the pipe; the workers see its end when this process closes it.
    pipe = os.pipe()
    try:
        pieces = _load(_WorkerPieces(passages, row, schedule, builder, pipe), workers)
        for window in schedule.windows(row):
            parts: list[CorpusWindow] = []
            for piece in itertools.islice(pieces, len(_pieces(window))):
                if isinstance(piece, Exception):
                    raise piece
                parts.append(piece)
            if not parts:
                return
            yield CorpusWindow.joined(parts)
    finally:
        for descriptor in pipe:
            os.close(descriptor)


def _pieces(window: range) -> list[range]:
    return [window[start : start + PIECE] for start in range(0, len(window), PIECE)]


def _load(pieces: _WorkerPieces, workers: int) -> Iterator[CorpusWindow | Exception]:
    with warnings.catch_warnings():
        # The user chooses the number of workers.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            pieces,
            batch_size=None,
            num_workers=workers,
            collate_fn=_identity,
            prefetch_factor=PREFETCHED_PIECES,
            worker_init_fn=init_worker,
            # A corpus that is a generator cannot be pickled.
            multiprocessing_context="fork",
            # Without a generator of its own, the loader would advance the global random state.
            generator=torch.Generator(),
        )
        return start_workers(loader)


@dataclass(frozen=True)
class _WorkerPieces(IterableDataset[CorpusWindow | Exception]):
    """Worker w of n builds the pieces w, w + n, …; an error is yielded as an item.

    The loader takes from the workers in turn, so its pieces are in the order of the corpus.
    """

    passages: Iterable[Passage]
    row: int
    schedule: WindowSchedule
    builder: WindowBuilder
    pipe: tuple[int, int]
    """Ends when the windows are no longer needed; a worker that is still skipping rows then exits at once."""

    def __iter__(self) -> Iterator[CorpusWindow | Exception]:
        worker = get_worker_info()
        assert worker is not None
        os.close(self.pipe[1])
        threading.Thread(target=self._exit_with_pipe, daemon=True).start()
        try:
            pieces = itertools.chain.from_iterable(map(_pieces, self.schedule.windows(self.row)))
            own = itertools.islice(pieces, worker.id, None, worker.num_workers)
            yield from itertools.starmap(self.builder, read_windows(lazy_passages(self.passages), 0, own))
        except (InputError, OSError) as error:
            # If it were raised here, its message would contain the worker's traceback.
            yield error

    def _exit_with_pipe(self) -> None:
        os.read(self.pipe[0], 1)
        # torch treats any exit code but 0 as a failure of the worker.
        os._exit(0)


def _identity(piece: Any) -> Any:
    return piece
