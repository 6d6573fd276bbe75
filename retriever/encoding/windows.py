"""Windows of a corpus: passages that are tokenized and sorted by length together.

If several ranks encode a corpus, it is divided among them by the shards of the store.
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

# Passages per window. Small windows cost more switches of Python's lock: BERT-base on one H200 encodes 1.45 million
# tokens/s with windows of 8,192 passages and 1.89 million with windows of this size.
WINDOW = 32768
# The first windows are smaller, so that the device starts early.
FIRST_WINDOW = 4096
# Maximum size of a window's float32 embeddings; a few windows wait in host memory.
WINDOW_BYTES = 2**27


@dataclass(frozen=True)
class WindowSchedule:
    """The rows of each window.

    A window depends only on its first row and ends at the end of a shard at the latest. The windows, and therefore the
    embeddings bitwise, are the same after an interruption and on another number of ranks.
    """

    shard_rows: int
    window: int
    """Maximum number of passages per window; large embeddings lower it."""
    dim: int
    share: Share = field(default_factory=Share)
    """The rank and the number of ranks: rank r of W encodes the shards r, r + W, …"""

    def windows(self, row: int) -> Iterator[range]:
        """Yield the rows of this rank's windows from `row` on, without end."""
        limit = max(1, min(self.window, WINDOW_BYTES // (4 * self.dim)))
        while True:
            shard, offset = divmod(row, self.shard_rows)
            if shard % self.share.size != self.share.rank:
                row += self.shard_rows - offset
                continue
            stop = row + min(limit, max(row, FIRST_WINDOW), self.shard_rows - offset)
            yield range(row, stop)
            row = stop


@dataclass(frozen=True)
class CorpusWindow:
    """Consecutive passages, as lines for the store and as tokens."""

    ids: list[str]
    lines: list[bytes]
    tokens: TokenizedTexts
    notices: list[tuple[str, str]]
    """(what is unusual, passage id) of unusual passages."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, pieces: list[CorpusWindow]) -> CorpusWindow:
        """Concatenate consecutive pieces."""
        chain = itertools.chain.from_iterable
        return cls(
            list(chain(piece.ids for piece in pieces)),
            list(chain(piece.lines for piece in pieces)),
            TokenizedTexts.concatenate([piece.tokens for piece in pieces]),
            list(chain(piece.notices for piece in pieces)),
        )


@dataclass(frozen=True)
class WindowBuilder:
    """Builds windows from passages. It has no model weights, so it can be used in worker processes."""

    tokenizer: TextTokenizer
    prompt: str
    """The model's prompt, inserted before each text."""
    store: str
    """Name of the store in error messages."""

    def __call__(self, row: int, passages: list[Passage]) -> CorpusWindow:
        """Build the window of `passages`, the first of which has the row number `row`.

        Raises:
            InputError: an id or a text cannot be stored.
        """
        lines = [passage_line(passage, f"{self.store}: row {row + n}") for n, passage in enumerate(passages)]
        notices = [(what, passage.id) for passage in passages for what in _notices_of(passage)]
        tokens = self.tokenizer([self.prompt + passage.content for passage in passages])
        return CorpusWindow([passage.id for passage in passages], lines, tokens, notices)


def _notices_of(passage: Passage) -> list[str]:
    """What is unusual in a passage; the user sees a count of each kind."""
    if not passage.content:
        return ["passages without any text"]
    if len(passage.content) > LONG_TEXT:
        return ["passages of more than 1 MiB, of which a model reads only the beginning"]
    return []


def lazy_passages(passages: Iterable[Passage]) -> Iterator[Callable[[], Passage]]:
    """Yield functions that return one passage each; those of a PassageFile parse it only when called."""
    if isinstance(passages, PassageFile):
        return passages.lazy()
    return (partial(_identity, passage) for passage in passages)


def skip(rows: Iterator[Any], count: int) -> None:
    """Advance an iterator by `count` items."""
    for _ in itertools.islice(rows, count):
        pass


def read_windows(
    rows: Iterator[Callable[[], Passage]], row: int, windows: Iterator[range]
) -> Iterator[tuple[int, list[Passage]]]:
    """Yield (first row, passages) of each window until the corpus ends.

    Args:
        rows: the corpus from row `row` on.
        row: the number of the next row.
        windows: the rows of each window, ascending.
    """
    for window in windows:
        skip(rows, window.start - row)
        passages = [read() for read in itertools.islice(rows, len(window))]
        if not passages:
            return
        yield window.start, passages
        row = window.stop


def _identity(passage: Passage) -> Passage:
    return passage
