"""Chunks of batches of images and captions: the unit that a worker process reads, decodes and tokenizes."""

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
from retriever.data.images.features import FeatureStore, PlaceholderFeatures
from retriever.data.images.pairs import BrokenPairError, PairSource
from retriever.data.schedules.schedule import BatchSchedule
from retriever.distributed.share import Share
from retriever.models.images.transforms import ImageTransform
from retriever.models.tokenizer import TextTokenizer, TokenizedTexts
from retriever.utils.workers import init_worker, start_workers

# Pairs per chunk: a few MiB of pixels, so that many workers share one large batch.
CHUNK_PAIRS = 128
# Chunks that each worker prepares in advance.
_PREFETCH = 2
# Second word of the seed for crops and for drawing captions; see data/schedules/ and data/batches.py for the others.
_PAIR = 4

NO_TOKENS = TokenizedTexts(np.empty(0, np.int32), np.zeros(1, np.int64))


@dataclass(frozen=True)
class PairChunk:
    """The readable pairs of some rows of a batch."""

    images: Tensor | None
    """Pixels or features as in `ImageInputs.pixels`; None if they are in shared memory of the parent process."""
    tokens: TokenizedTexts
    keys: list[str]
    captions: list[str]
    """The caption of each pair, drawn from all its captions."""
    all_captions: list[tuple[str, ...]]
    """All captions of each pair."""
    broken: list[str]
    """One line for each pair that could not be read."""
    error: str = ""
    """Message if the source as a whole cannot be read. A string, because exceptions from workers gain a traceback."""


@dataclass(frozen=True)
class PairReader:
    """Reads, decodes and tokenizes pairs of one source. Picklable."""

    source: PairSource
    transform: ImageTransform
    augment: bool
    """Whether images are randomly cropped."""
    tokenizer: TextTokenizer
    prompt: str
    """Prompt of the captions."""
    max_broken: float
    """Largest fraction of pairs that may be broken."""
    features: FeatureStore | PlaceholderFeatures | None = None
    """Features of a locked image encoder, read instead of pixels."""

    def allocate(self, *rows: int) -> Tensor:
        """Return uninitialized memory [*rows, …] for pixels or features."""
        # numpy's memory may have pages of 2 MiB, which are filled faster.
        if self.features is None:
            return torch.from_numpy(np.empty((*rows, 3, *self.transform.size), dtype=np.uint8))
        return torch.from_numpy(np.empty((*rows, self.features.width), dtype=np.float16))

    def __call__(self, rows: Sequence[int], seeds: Sequence[list[int]], out: Tensor | None = None) -> PairChunk:
        """Read the pairs of some rows.

        Args:
            rows: The rows.
            seeds: Seed of each row, which determines the crop and the caption.
            out: Memory from `allocate` for at least `len(rows)` images. Default: None, newly allocated.
        """
        images = self.allocate(len(rows)) if out is None else out
        keys: list[str] = []
        captions, all_captions, broken = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            generator = np.random.default_rng(seed)
            try:
                pair = self.source.read(row, self.features is None)
                if self.features is not None:
                    image = self.features.read(row, pair.location)
                elif self.augment:
                    image = self.transform.augment(pair.open(), generator)
                else:
                    image = self.transform.pixels(pair.open())
            except BrokenPairError as error:
                broken.append(str(error))
                continue
            images[len(keys)] = image
            keys.append(pair.key)
            captions.append(pair.captions[generator.integers(len(pair.captions))])
            all_captions.append(pair.captions)
        texts = [self.prompt + caption for caption in captions]
        # Tokenizers raise an error for an empty list.
        tokens = self.tokenizer(texts) if texts else NO_TOKENS
        return PairChunk(images[: len(keys)] if out is None else None, tokens, keys, captions, all_captions, broken)


class Chunks(Dataset[PairChunk]):
    """Dataset of the chunks of all batches, in the order of the steps."""

    def __init__(self, readers: Sequence[PairReader], schedule: BatchSchedule, share: Share) -> None:
        self.readers, self.schedule, self._share = list(readers), schedule, share
        self._slots: Tensor | None = None

    def _with_shared_memory(self, workers: int) -> Chunks:
        """Return a copy whose workers write images into shared memory, which is reused.

        The first use of a page of shared memory takes a twentieth of the time of decoding the images that fill it.
        """
        chunks = copy.copy(self)
        if workers:
            # DataLoader requests the next chunk before it returns one.
            chunks._slots = self.readers[0].allocate(_PREFETCH * workers + 2, CHUNK_PAIRS).share_memory_()
        return chunks

    def _images(self, number: int, chunk: PairChunk) -> Tensor:
        if chunk.images is not None:
            return chunk.images
        assert self._slots is not None
        return self._slots[number % len(self._slots)][: len(chunk.keys)]

    def positions(self, source: int) -> range:
        """Return this process's positions in a batch of a source."""
        return self._share.of(self.schedule.batch_rows(source))

    @property
    def max_pairs(self) -> int:
        """Number of this process's pairs in the largest batch."""
        return max(len(self.positions(source)) for source in range(len(self.readers)))

    @property
    def per_batch(self) -> int:
        """Number of chunks of every batch. The last chunks of a smaller batch may be empty."""
        return -(-self.max_pairs // CHUNK_PAIRS)

    def __len__(self) -> int:
        return len(self.schedule) * self.per_batch

    def __getitem__(self, number: int) -> PairChunk:
        step, chunk = divmod(number, self.per_batch)
        source, rows = self.schedule.rows(step)
        positions = self.positions(source)[chunk * CHUNK_PAIRS : (chunk + 1) * CHUNK_PAIRS]
        seeds = [[self.schedule.seed, _PAIR, step, position] for position in positions]
        out = None if self._slots is None else self._slots[number % len(self._slots)]
        try:
            return self.readers[source](rows[positions.start : positions.stop].tolist(), seeds, out)
        except InputError as error:
            return _failed(str(error))
        except OSError as error:
            return _failed(f"{error.filename or self.readers[source].source.name}: {error.strerror or error}")

    def load(self, start: int, workers: int) -> Generator[tuple[PairChunk, Tensor], None, None]:
        """Iterate over the chunks and their images.

        The images of a chunk are valid until the next chunk is requested. The worker processes end with the iterator.

        Args:
            start: Number of the first chunk.
            workers: Number of worker processes; 0: the calling process.

        Raises:
            InputError: If a source cannot be read.
        """
        chunks = self._with_shared_memory(workers)
        stream: Any = start_workers(
            DataLoader(
                chunks,
                batch_size=None,
                sampler=range(start, len(chunks)),
                num_workers=workers,
                collate_fn=_unchanged,
                generator=torch.Generator(),
                prefetch_factor=_PREFETCH if workers else None,
                worker_init_fn=init_worker if workers else None,
            )
        )
        # A separate generator function, so that the workers are started now, by the calling thread.
        return chunks._iterate(stream, start, workers)

    def _iterate(self, stream: Any, start: int, workers: int) -> Generator[tuple[PairChunk, Tensor], None, None]:
        try:
            for number, chunk in enumerate(stream, start=start):
                if chunk.error:
                    raise InputError(chunk.error)
                yield chunk, self._images(number, chunk)
        finally:
            if workers:
                # Now, though a traceback may keep the iterator.
                stream._shutdown_workers()


def _failed(message: str) -> PairChunk:
    return PairChunk(torch.empty(0), NO_TOKENS, [], [], [], [], message)


def _unchanged(chunk: Any) -> Any:
    return chunk
