"""A corpus in windows, of passages that are sorted by length together: lines for a store, tokens for a tower.

A corpus that several ranks embed is divided by the shards of its store.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from index.passages import Passage, PassageFile
from index.store.shards import passage_line
from retriever.data.sources import LONG_TEXT
from retriever.distributed.share import Share
from retriever.models.tokenizer import TextTokenizer, TokenizedTexts

# Passages read, tokenized and sorted by length at a time. Each window costs its threads their turns at Python's lock
# again: 1.45 million tokens/s in windows of 8,192, 1.89 million in these, by one run of BERT-base on an H200.
WINDOW = 32768
# The first ones are smaller, so that a device soon has work.
FIRST_WINDOW = 4096
# Of a window's embeddings, some of which wait on the host.
WINDOW_BYTES = 2**27


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
            TokenizedTexts.concatenate([piece.tokens for piece in pieces]),
            list(chain(piece.odd for piece in pieces)),
        )


@dataclass(frozen=True)
class WindowMaker:
    """Makes windows of passages; it has no weights, so that processes can."""

    tokenizer: TextTokenizer
    prompt: str
    """Of the model, put before each text."""
    store: str
    """Named in errors."""

    def __call__(self, row: int, passages: list[Passage]) -> CorpusWindow:
        """The window of the passages that begin at a row.

        Raises:
            InputError: an id or a text of them cannot be stored.
        """
        lines = [passage_line(passage, f"{self.store}: row {row + n}") for n, passage in enumerate(passages)]
        odd = [(what, passage.id) for passage in passages for what in _oddities(passage)]
        tokens = self.tokenizer([self.prompt + passage.content for passage in passages])
        return CorpusWindow([passage.id for passage in passages], lines, tokens, odd)


def _oddities(passage: Passage) -> list[str]:
    """What a user should hear of a passage, once for all of a kind."""
    if not passage.content:
        return ["passages without any text"]
    if len(passage.content) > LONG_TEXT:
        return ["passages of more than 1 MiB, of which a model reads only the beginning"]
    return []


def unread(passages: Iterable[Passage]) -> Iterator[Callable[[], Passage]]:
    """Each passage as what reads it."""
    if isinstance(passages, PassageFile):
        return passages.lazy()
    return (partial(_unchanged, passage) for passage in passages)


def pass_over(rows: Iterator[Any], count: int) -> None:
    """Leave so many rows to others."""
    for _ in itertools.islice(rows, count):
        pass


def read(
    rows: Iterator[Callable[[], Passage]], row: int, windows: Iterator[range]
) -> Iterator[tuple[int, list[Passage]]]:
    """(first row, passages) of each window until the corpus ends, where the next of the `rows` is the row `row`."""
    for window in windows:
        pass_over(rows, window.start - row)
        some = [passage() for passage in itertools.islice(rows, len(window))]
        if not some:
            return
        yield window.start, some
        row = window.stop


def _unchanged(window: Any) -> Any:
    return window
