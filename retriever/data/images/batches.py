"""Batches of images and captions. Worker processes read and decode one chunk of a batch at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index.files import InputError
from retriever.data.batches import PairKeys
from retriever.data.images.chunks import Chunks, PairChunk, PairReader
from retriever.data.images.pairs import check_broken
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.length_sorting import make_micro_batches
from retriever.data.micro_batches import PreparedBatch, TextInputs
from retriever.data.schedules.schedule import BatchSchedule
from retriever.distributed.share import Share
from retriever.models.tokenizer import TokenizedTexts

if TYPE_CHECKING:
    from retriever.models.images.towers import ImageTextTowers


@dataclass(frozen=True)
class ImageInputs:
    """The images of a batch, on the host. They are copied to the device one micro-batch at a time."""

    pixels: Tensor
    """uint8 [n, 3, height, width], or features of a locked image encoder, float16 [n, width]. Other batches
    reuse the memory after this object is deleted."""
    tokens_each: int
    """Number of tokens of an image."""
    micro_batches: list[np.ndarray]
    """Row numbers of each micro-batch, consecutive."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each image, int64 [n]."""
        return np.full(len(self.pixels), self.tokens_each, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels or features."""
        return self.pixels.nbytes

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> Tensor:
        """Compute the embeddings [rows, D] of one micro-batch."""
        return towers.embed_pixels(self.pixels[int(rows[0]) : int(rows[-1]) + 1])


@dataclass(frozen=True)
class MicroBatchSettings:
    """How batches of images and captions are divided into micro-batches."""

    image_tokens: int
    """Number of tokens of an image."""
    token_budget: int
    """Largest number of tokens in a micro-batch."""
    padded: bool
    """Whether texts are padded; otherwise they are packed."""
    device: str
    """Device type of the towers, "cpu" or "cuda"."""


class ImageBatches:
    """The batches of a run on images and captions, in order. They do not depend on the number of workers.

    A pair that cannot be read is missing in its batch, which is then smaller.
    """

    def __init__(
        self,
        readers: Sequence[PairReader],
        schedule: BatchSchedule,
        settings: MicroBatchSettings,
        *,
        report: Callable[[str], None],
        known: KnownPositives | None = None,
        share: Share | None = None,
    ) -> None:
        """Create the batches.

        Args:
            readers: Reader of each source.
            schedule: The rows of each step.
            settings: Division into micro-batches.
            report: Called with a line for pairs that cannot be read.
            known: Captions of the images that several rows of a table name. Default: None.
            share: Rank and number of ranks; only the pairs of this rank are read. Default: None, a single rank.
        """
        self._readers = list(readers)
        self._share = share or Share()
        self._chunks = Chunks(readers, schedule, self._share)
        self._schedule = schedule
        self._settings = settings
        self._report = report
        self._known = known if known is not None and len(known) else None
        self._read = [0] * len(self._readers)
        self._broken = [0] * len(self._readers)
        self._free: list[Tensor] = []

    @property
    def schedule(self) -> BatchSchedule:
        """The rows of each step."""
        return self._schedule

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def loader(self, *, start: int = 0, workers: int = 0) -> Generator[PreparedBatch, None, None]:
        """Iterate over the batches from step `start`. The next batch is prepared in a background thread.

        Args:
            start: First step. Default: 0.
            workers: Number of worker processes. Default: 0, the calling process.

        Raises:
            InputError: If too many pairs of a source are broken, or a source cannot be read.
        """
        stream = self._chunks.load(start * self._chunks.per_batch, workers)
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            try:
                next_batch = pool.submit(self._assemble, stream, start, stopped)
                for step in range(start, len(self)):
                    batch = next_batch.result()
                    if step + 1 < len(self):
                        next_batch = pool.submit(self._assemble, stream, step + 1, stopped)
                    yield batch
            finally:
                stopped.set()
                pool.submit(stream.close)

    def in_memory(self, workers: int) -> int:
        """Return the number of batches that are in memory at the same time. Workers hold only a few chunks."""
        return 3

    def _assemble(
        self, stream: Generator[tuple[PairChunk, Tensor], None, None], step: int, stopped: threading.Event
    ) -> PreparedBatch:
        """Assemble the next chunks of the stream into the batch of `step`."""
        source, _ = self._schedule.rows(step)
        pixels, count = torch.empty(0), 0
        chunks: list[PairChunk] = []
        for _ in range(self._chunks.per_batch):
            if stopped.is_set():
                break
            chunk, images = next(stream)
            chunks.append(chunk)
            if len(chunk.keys):
                if not count:
                    pixels = self._free.pop() if self._free else self._readers[source].allocate(self._chunks.max_pairs)
                pixels[count : count + len(chunk.keys)] = images
                count += len(chunk.keys)
        self._count(source, len(self._chunks.positions(source)), [line for chunk in chunks for line in chunk.broken])
        if not count:
            raise InputError(f"{self._readers[source].source.name}: no pair of step {step + 1} can be read")
        tokens = TokenizedTexts.concatenate([chunk.tokens for chunk in chunks])
        keys = self._keys(
            [key for chunk in chunks for key in chunk.keys],
            [caption for chunk in chunks for caption in chunk.captions],
            [captions for chunk in chunks for captions in chunk.all_captions],
        )
        settings = self._settings
        size = max(1, settings.token_budget // settings.image_tokens)
        image_rows = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
        inputs = ImageInputs(pixels[:count], settings.image_tokens, image_rows)
        # The memory is reused, because allocating it takes as long as filling it.
        weakref.finalize(inputs, self._free.append, pixels).atexit = False
        text_rows = make_micro_batches(
            tokens.lengths, settings.token_budget, padded=settings.padded, device=settings.device
        )
        groups: list[Any] = [inputs, TextInputs("document", tokens, text_rows)]
        if self._share.size == 1:
            return PreparedBatch(groups, count, keys.false_negatives(), settings.padded, source=source)
        return PreparedBatch(groups, count, None, settings.padded, keys, source=source)

    def _keys(self, image_keys: list[str], captions: list[str], all_captions: list[tuple[str, ...]]) -> PairKeys:
        """Return the digests of images and captions, with all known pairs of these images."""
        images, drawn = text_digests(image_keys), text_digests(captions)
        known_images = np.repeat(images, [len(texts) for texts in all_captions])
        known_captions = text_digests(text for texts in all_captions for text in texts)
        pairs = np.stack([known_images, known_captions], axis=1)
        if self._known is not None and self._share.size == 1:
            pairs = np.concatenate([pairs, self._known.pairs(images, drawn)])
        return PairKeys(images, drawn, np.empty(0, np.int64), pairs)

    @property
    def known(self) -> KnownPositives | None:
        """Captions of the images that several rows name; None if there are none."""
        return self._known

    def _count(self, source: int, rows: int, broken: list[str]) -> None:
        reader = self._readers[source]
        before = self._broken[source]
        self._read[source] += rows
        self._broken[source] += len(broken)
        for number, line in enumerate(broken, start=before + 1):
            # The first ten, then only powers of two.
            if number <= 10 or number & (number - 1) == 0:
                self._report(f"{line} (pair left out: number {number} of {self._read[source]:,} read)")
        if broken:
            counts = self._broken[source], self._read[source]
            check_broken(reader.source.name, *counts, reader.max_broken, f"the last: {broken[-1]}")
