"""Chunks of batches of pictures and captions: what one worker process reads, decodes and tokenizes at a time."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from index.files import InputError
from retriever.data.images.features import FeatureStore, PlannedFeatures
from retriever.data.images.sources import BrokenPairError, PairSource
from retriever.data.schedule import BatchSchedule
from retriever.distributed.share import Share
from retriever.models.images.transforms import ImageTransform
from retriever.models.tokenizer import TextTokenizer, TokenizedTexts
from retriever.utils.workers import init_worker

# Pairs that a worker hands over at once: some MiB of pixels, so that many workers share one large batch.
CHUNK = 128
# Chunks that each worker makes ahead.
_AHEAD = 2
# Beside the keys in data/schedule.py and data/batches.py: crops, and which caption a row shows.
_PAIR = 4

NO_TOKENS = TokenizedTexts(np.empty(0, np.int32), np.zeros(1, np.int64))


@dataclass(frozen=True)
class PairChunk:
    """What a worker made of some rows of a batch: the pairs that could be read."""

    pictures: Tensor | None
    """As `ImageGroup.pixels`; none where they are in memory that the parent gave."""
    tokens: TokenizedTexts
    keys: list[str]
    captions: list[str]
    known: list[tuple[str, ...]]
    """All captions of each pair, of which one was drawn."""
    broken: list[str]
    """One line for each pair that is left out."""
    failed: str = ""
    """Why nothing can be read any more: as a text, since errors that pass between processes gain a traceback."""


@dataclass(frozen=True)
class PairReader:
    """Reads pairs of one source and makes them ready; picklable."""

    source: PairSource
    transform: ImageTransform
    augment: bool
    tokenizer: TextTokenizer
    prompt: str
    max_broken: float
    """Share of the pairs read that may be left out."""
    features: FeatureStore | PlannedFeatures | None = None
    """Of a locked tower, instead of pixels."""

    def memory(self, *rows: int) -> Tensor:
        """Room [*rows, ...] for pictures or features; in pages of 2 MiB where numpy asks for them, faster to fill."""
        if self.features is None:
            return torch.from_numpy(np.empty((*rows, 3, *self.transform.size), dtype=np.uint8))
        return torch.from_numpy(np.empty((*rows, self.features.width), dtype=np.float16))

    def __call__(self, rows: Sequence[int], seeds: Sequence[list[int]], into: Tensor | None = None) -> PairChunk:
        """The pairs of these rows; a seed decides on the crop and on the caption.

        Args:
            into: memory for the pictures, as `memory` gives it, at least as many as rows.
        """
        pictures = self.memory(len(rows)) if into is None else into
        keys: list[str] = []
        captions, known, broken = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            chance = np.random.default_rng(seed)
            try:
                pair = self.source.read(row, self.features is None)
                if self.features is not None:
                    picture = self.features.read(row, pair.place)
                elif self.augment:
                    picture = self.transform.augmented(pair.open(), chance)
                else:
                    picture = self.transform.pixels(pair.open())
            except BrokenPairError as error:
                broken.append(str(error))
                continue
            pictures[len(keys)] = picture
            keys.append(pair.key)
            captions.append(pair.captions[chance.integers(len(pair.captions))])
            known.append(pair.captions)
        texts = [self.prompt + caption for caption in captions]
        # Tokenizers fail on no texts at all.
        tokens = self.tokenizer(texts) if texts else NO_TOKENS
        return PairChunk(pictures[: len(keys)] if into is None else None, tokens, keys, captions, known, broken)


class Chunks(Dataset[PairChunk]):
    """Chunk by chunk, the batches of all steps; in whichever process asks for them."""

    def __init__(self, readers: Sequence[PairReader], schedule: BatchSchedule, share: Share) -> None:
        self.readers, self.schedule, self._share = list(readers), schedule, share
        self._slots: Tensor | None = None

    def _over(self, workers: int) -> Chunks:
        """The same, with memory that `workers` processes share: they write pictures into it, chunk after chunk.

        Pages of shared memory cost their first use as much as a twentieth of decoding what fills them.
        """
        chunks = copy.copy(self)
        if workers:
            # A loader asks for the next chunk before it gives one away.
            chunks._slots = self.readers[0].memory(_AHEAD * workers + 2, CHUNK).share_memory_()
        return chunks

    def _pictures(self, number: int, chunk: PairChunk) -> Tensor:
        if chunk.pictures is not None:
            return chunk.pictures
        assert self._slots is not None
        return self._slots[number % len(self._slots)][: len(chunk.keys)]

    def places(self, source: int) -> range:
        """This process's places within a batch of a source."""
        return self._share.of(self.schedule.batch_rows(source))

    @property
    def most(self) -> int:
        """Pairs of the largest batch."""
        return max(len(self.places(source)) for source in range(len(self.readers)))

    @property
    def a_batch(self) -> int:
        """Chunks of each batch; of a smaller one the last may be empty."""
        return -(-self.most // CHUNK)

    def __len__(self) -> int:
        return len(self.schedule) * self.a_batch

    def __getitem__(self, number: int) -> PairChunk:
        step, chunk = divmod(number, self.a_batch)
        source, rows = self.schedule.rows(step)
        mine = self.places(source)[chunk * CHUNK : (chunk + 1) * CHUNK]
        seeds = [[self.schedule.seed, _PAIR, step, place] for place in mine]
        into = None if self._slots is None else self._slots[number % len(self._slots)]
        try:
            return self.readers[source](rows[mine.start : mine.stop].tolist(), seeds, into)
        except InputError as error:
            return _failed(str(error))
        except OSError as error:
            return _failed(f"{error.filename or self.readers[source].source.name}: {error.strerror or error}")

    def loaded(self, start: int, workers: int) -> Generator[tuple[PairChunk, Tensor], None, None]:
        """The chunks from number `start`, each with its pictures, which are there until the next one is asked for.

        The processes end when the iterator does, or is closed.

        Raises:
            InputError: a source can no longer be read.
        """
        chunks = self._over(workers)
        stream: Any = iter(
            DataLoader(
                chunks,
                batch_size=None,
                sampler=range(start, len(chunks)),
                num_workers=workers,
                collate_fn=_unchanged,
                generator=torch.Generator(),
                prefetch_factor=_AHEAD if workers else None,
                worker_init_fn=init_worker if workers else None,
            )
        )
        # Called here, for processes are best started by the main thread.
        return chunks._given(stream, start, workers)

    def _given(self, stream: Any, start: int, workers: int) -> Generator[tuple[PairChunk, Tensor], None, None]:
        try:
            for number, chunk in enumerate(stream, start=start):
                if chunk.failed:
                    raise InputError(chunk.failed)
                yield chunk, self._pictures(number, chunk)
        finally:
            if workers:
                # Not left to the garbage collector: a traceback may hold the iterator until the interpreter ends, which
                # then waits for processes that nobody has told to stop.
                stream._shutdown_workers()


def _failed(reason: str) -> PairChunk:
    return PairChunk(torch.empty(0), NO_TOKENS, [], [], [], [], reason)


def _unchanged(chunk: Any) -> Any:
    return chunk
