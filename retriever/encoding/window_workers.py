"""Windows of a corpus made ahead of their use, by threads or by processes of which each makes every n-th piece of them.

A thread's share of Python's lock is what a GPU then waits for; processes have locks of their own.
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
from retriever.encoding.windows import CorpusWindow, Cut, WindowMaker, pass_over, read, unread
from retriever.utils.prefetch import prefetch
from retriever.utils.torchrun import local_world_size
from retriever.utils.workers import init_worker, start_workers

# Passages that a worker makes at a time, and how many times so many it may be ahead: a whole window takes one process
# ten seconds, for which a GPU would wait at the start.
PIECE, PIECES_AHEAD = 4096, 4

# Each brings some 200,000 tokens/s, and as many as six no more than threads do (BERT-base on an H200, which takes 2.5
# million); four processors are left to what launches, writes and feeds.
MOST_WORKERS, LEAST_WORKERS, OTHER_PROCESSORS = 12, 7, 4


def workers_for(device: torch.device) -> int:
    """How many processes should make windows for a device; 0 where threads are as quick."""
    # Workers are forks, and where there are none nobody says which processors are ours.
    if device.type != "cuda" or not hasattr(os, "sched_getaffinity"):
        return 0
    processors = len(os.sched_getaffinity(0)) // local_world_size()
    count = min(MOST_WORKERS, processors - OTHER_PROCESSORS)
    return count if count >= LEAST_WORKERS else 0


def corpus_windows(
    passages: Iterable[Passage], row: int, cut: Cut, maker: WindowMaker, workers: int = 0
) -> Generator[CorpusWindow, None, None]:
    """This rank's windows of a corpus from its row `row` on, made ahead of their use. Close it to end what makes them.

    Args:
        passages: the whole corpus; with workers it is read from its beginning by each of them, so nothing of it may
            have been read before. Of a PassageFile little more is read than what the windows hold.
        workers: processes; none for a thread of this one.

    Raises:
        InputError: a passage is bad.
        OSError: the corpus cannot be read.
    """
    if not workers:
        rows = unread(passages)
        # Here, where the user may end it.
        pass_over(rows, row)
        passages_read = read(rows, row, cut.windows(row))
        with (
            contextlib.closing(prefetch(passages_read)) as some,
            contextlib.closing(prefetch(itertools.starmap(maker, some))) as made,
        ):
            yield from made
        return
    # The workers read from it nothing but its end.
    pipe = os.pipe()
    try:
        pieces = _loaded(_WorkersPieces(passages, row, cut, maker, pipe), workers)
        for window in cut.windows(row):
            own: list[CorpusWindow] = []
            for piece in itertools.islice(pieces, len(_pieces(window))):
                if isinstance(piece, Exception):
                    raise piece
                own.append(piece)
            if not own:
                return
            yield CorpusWindow.joined(own)
    finally:
        for descriptor in pipe:
            os.close(descriptor)


def _pieces(window: range) -> list[range]:
    return [window[start : start + PIECE] for start in range(0, len(window), PIECE)]


def _loaded(pieces: _WorkersPieces, workers: int) -> Iterator[CorpusWindow | Exception]:
    with warnings.catch_warnings():
        # How many there are is the user's to say.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            pieces,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=PIECES_AHEAD,
            worker_init_fn=init_worker,
            # A corpus that is a generator cannot be sent.
            multiprocessing_context="fork",
            # Else the caller's random numbers would be others.
            generator=torch.Generator(),
        )
        return start_workers(loader)


@dataclass(frozen=True)
class _WorkersPieces(IterableDataset[CorpusWindow | Exception]):
    """Of each worker every n-th piece, and what stopped it: the loader takes from them in turns, so that what it hands
    out is in the order of the corpus."""

    passages: Iterable[Passage]
    row: int
    cut: Cut
    maker: WindowMaker
    pipe: tuple[int, int]
    """Its end comes when nobody wants more: a worker may be on its way to a row far off, and has nothing to save."""

    def __iter__(self) -> Iterator[CorpusWindow | Exception]:
        worker = get_worker_info()
        assert worker is not None
        os.close(self.pipe[1])
        threading.Thread(target=self._end_with_pipe, daemon=True).start()
        try:
            pieces = itertools.chain.from_iterable(map(_pieces, self.cut.windows(self.row)))
            own = itertools.islice(pieces, worker.id, None, worker.num_workers)
            yield from itertools.starmap(self.maker, read(unread(self.passages), 0, own))
        except (InputError, OSError) as error:
            # Raised there it would come with the worker's traceback for a message.
            yield error

    def _end_with_pipe(self) -> None:
        os.read(self.pipe[0], 1)
        # As a worker that is done: torch takes any other end for a failure.
        os._exit(0)


def _unchanged(piece: Any) -> Any:
    return piece
