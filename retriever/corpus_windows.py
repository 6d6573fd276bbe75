"""A corpus in windows, of passages that are sorted by length together: lines for a store, tokens for a tower.

They are made by a thread, or by processes of which each makes every n-th piece of them: one thread's share of Python's
lock is what a GPU then waits for. A corpus that several ranks embed is divided by the shards of its store.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from index.files import InputError
from index.passages import Passage, PassageFile
from index.shards import passage_line
from retriever.ahead import ahead
from retriever.data.schedule import Share
from retriever.data.sources import HUGE_TEXT
from retriever.tokens import TextTokenizer, TokenizedTexts
from retriever.workers import become_worker, started

# Passages read, tokenized and sorted by length at a time. Each window costs its threads their turns at Python's lock
# again: 1.45 million tokens/s in windows of 8,192, 1.89 million in these, by one run of BERT-base on an H200.
WINDOW = 32768
# The first ones are smaller, so that a device soon has work.
FIRST_WINDOW = 4096
# Of a window's embeddings, some of which wait on the host.
WINDOW_BYTES = 2**27
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
    processors = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = min(MOST_WORKERS, processors - OTHER_PROCESSORS)
    return count if count >= LEAST_WORKERS else 0


@dataclass(frozen=True)
class Cut:
    """How a corpus is cut. Windows depend on the row alone, and end where a shard does: after an interruption, and on
    another rank, the same ones follow, and so the same bits."""

    shard_rows: int
    window: int
    """Most passages of a window, if their embeddings are not too large."""
    dim: int
    share: Share = field(default_factory=Share)
    """Who embeds which shards: rank r of W has r, r + W, …"""

    def windows(self, row: int) -> Iterator[range]:
        """The rows of this rank's windows from the row `row` on, of a corpus without end."""
        most = max(1, min(self.window, WINDOW_BYTES // (4 * self.dim)))
        while True:
            shard, within = divmod(row, self.shard_rows)
            if shard % self.share.size != self.share.rank:
                row += self.shard_rows - within
                continue
            stop = row + min(most, max(row, FIRST_WINDOW), self.shard_rows - within)
            yield range(row, stop)
            row = stop


@dataclass(frozen=True)
class CorpusWindow:
    """Passages as a store takes them, and their tokens."""

    ids: list[str]
    lines: list[bytes]
    tokens: TokenizedTexts
    odd: list[tuple[str, str]]
    """What is odd in which passage."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, pieces: list[CorpusWindow]) -> CorpusWindow:
        """One of several that follow one another."""
        chain = itertools.chain.from_iterable
        return cls(
            list(chain(piece.ids for piece in pieces)),
            list(chain(piece.lines for piece in pieces)),
            TokenizedTexts.joined([piece.tokens for piece in pieces]),
            list(chain(piece.odd for piece in pieces)),
        )


@dataclass(frozen=True)
class WindowMaker:
    """Makes windows of passages; it has no weights, so that processes can."""

    tokenizer: TextTokenizer
    prompt: str
    store: str
    """Named in errors."""

    def __call__(self, row: int, passages: list[Passage]) -> CorpusWindow:
        """The window of the passages that begin at a row.

        Raises:
            InputError: an id or a text of them cannot be stored.
        """
        lines = [passage_line(passage, f"{self.store}: row {row + n}") for n, passage in enumerate(passages)]
        odd = [(what, passage.id) for passage in passages for what in oddities(passage)]
        return CorpusWindow([passage.id for passage in passages], lines, self.tokens(passages), odd)

    def tokens(self, passages: list[Passage]) -> TokenizedTexts:
        """Token ids of the passages, with the model's prompt before each."""
        return self.tokenizer([self.prompt + passage.content for passage in passages])


def oddities(passage: Passage) -> list[str]:
    """What a user should hear of a passage, once for all of a kind."""
    if not passage.content:
        return ["passages without any text"]
    if len(passage.content) > HUGE_TEXT:
        return ["passages of more than 1 MiB, of which a model reads only the beginning"]
    return []


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
        unread = _unread(passages)
        # Here, where the user may end it.
        _pass_over(unread, row)
        read = _read(unread, row, cut.windows(row))
        with contextlib.closing(ahead(read)) as some, contextlib.closing(ahead(itertools.starmap(maker, some))) as made:
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


def _unread(passages: Iterable[Passage]) -> Iterator[Callable[[], Passage]]:
    if isinstance(passages, PassageFile):
        return passages.unread()
    return (partial(_unchanged, passage) for passage in passages)


def _pass_over(rows: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(rows, count):
        pass


def _read(
    unread: Iterator[Callable[[], Passage]], row: int, windows: Iterator[range]
) -> Iterator[tuple[int, list[Passage]]]:
    """(first row, passages) of each window until the corpus ends, where `unread` is at the row `row`."""
    for window in windows:
        _pass_over(unread, window.start - row)
        some = [read() for read in itertools.islice(unread, len(window))]
        if not some:
            return
        yield window.start, some
        row = window.stop


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
            worker_init_fn=become_worker,
            # A corpus that is a generator cannot be sent.
            multiprocessing_context="fork",
            # Else the caller's random numbers would be others.
            generator=torch.Generator(),
        )
        return started(loader)


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
            yield from itertools.starmap(self.maker, _read(_unread(self.passages), 0, own))
        except (InputError, OSError) as error:
            # Raised there it would come with the worker's traceback for a message.
            yield error

    def _end_with_pipe(self) -> None:
        os.read(self.pipe[0], 1)
        # As a worker that is done: torch takes any other end for a failure.
        os._exit(0)


def _unchanged(window: Any) -> Any:
    return window
