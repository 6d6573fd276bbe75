"""Batches of pictures and captions: worker processes read and decode a chunk of a batch at a time."""

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
from retriever.data.images.sources import check_broken
from retriever.data.known_positives import KnownPositives, digests
from retriever.data.length_sorting import pack
from retriever.data.micro_batches import PreparedBatch, TextGroup
from retriever.data.schedule import BatchSchedule
from retriever.distributed.share import Share
from retriever.models.tokenizer import TokenizedTexts

if TYPE_CHECKING:
    from retriever.models.images.towers import ImageTextTowers


@dataclass(frozen=True)
class ImageGroup:
    """The pictures of a batch, on the host; micro-batches of them visit the device one after another."""

    pixels: Tensor
    """uint8 [n, 3, height, width]; or, of a locked tower, what its encoder made of them: float16 [n, width]. Once this
    group is gone, other batches use the memory."""
    tokens_each: int
    """Tokens that a picture is to the tower."""
    micro_batches: list[np.ndarray]
    """Row numbers of each, without gaps."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each picture, int64 [n]."""
        return np.full(len(self.pixels), self.tokens_each, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels or features."""
        return self.pixels.nbytes

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> Tensor:
        """Embeddings [rows, dimension]."""
        return towers.embed_pixels(self.pixels[int(rows[0]) : int(rows[-1]) + 1])


class ImageBatches:
    """Every batch of a run on pictures, in order: a function of seed and step, whatever the number of workers.

    A pair that cannot be read is missing from its batch, which is then smaller by it.
    """

    def __init__(
        self,
        readers: Sequence[PairReader],
        schedule: BatchSchedule,
        *,
        image_tokens: int,
        token_budget: int,
        padded: bool,
        device: str,
        say: Callable[[str], None],
        known: KnownPositives | None = None,
        share: Share | None = None,
    ) -> None:
        """Batches over the readers' sources, in the order of `schedule`, cut for a type of `device`.

        Args:
            say: prints what is left out.
            known: the captions of images that several rows of a table name.
            share: of each batch the part of one process, none for the whole; only its pairs are read.
        """
        self._readers = list(readers)
        self._share = share or Share()
        self._chunks = Chunks(readers, schedule, self._share)
        self._schedule = schedule
        self._image_tokens = image_tokens
        self._token_budget = token_budget
        self._padded = padded
        self._device = device
        self._say = say
        self._known = known if known is not None and len(known) else None
        self._read = [0] * len(self._readers)
        self._broken = [0] * len(self._readers)
        self._free: list[Tensor] = []

    @property
    def schedule(self) -> BatchSchedule:
        """Which rows make the batch of a step."""
        return self._schedule

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def loader(self, *, start: int = 0, workers: int = 0) -> Generator[PreparedBatch, None, None]:
        """The batches from step `start`, each decoded while the one before it is used.

        Two batches of pixels are in the host's memory at a time, or three while one is handed over.

        Raises:
            InputError: more pairs of a source are broken than it allows.
        """
        stream = self._chunks.loaded(start * self._chunks.a_batch, workers)
        left = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            try:
                ahead = pool.submit(self._assemble, stream, start, left)
                for step in range(start, len(self)):
                    batch = ahead.result()
                    if step + 1 < len(self):
                        ahead = pool.submit(self._assemble, stream, step + 1, left)
                    yield batch
            finally:
                left.set()
                pool.submit(stream.close)

    def waiting(self, workers: int) -> int:
        """Batches that are in memory at once, whatever the number of workers, which hold a few chunks each."""
        return 3

    def _assemble(
        self, stream: Generator[tuple[PairChunk, Tensor], None, None], step: int, left: threading.Event
    ) -> PreparedBatch:
        """The next batch of the stream, which is that of `step`."""
        source, _ = self._schedule.rows(step)
        rows = self._chunks.places(source)
        pixels, filled = torch.empty(0), 0
        chunks: list[PairChunk] = []
        for _ in range(self._chunks.a_batch):
            if left.is_set():
                break
            chunk, pictures = next(stream)
            chunks.append(chunk)
            if len(chunk.keys):
                if not filled:
                    pixels = self._free.pop() if self._free else self._readers[source].memory(self._chunks.most)
                pixels[filled : filled + len(chunk.keys)] = pictures
                filled += len(chunk.keys)
        self._count(source, len(rows), [line for chunk in chunks for line in chunk.broken])
        if not filled:
            raise InputError(f"{self._readers[source].source.name}: no pair of step {step + 1} can be read")
        tokens = _joined([chunk.tokens for chunk in chunks])
        keys = [key for chunk in chunks for key in chunk.keys]
        captions = [caption for chunk in chunks for caption in chunk.captions]
        texts = self._keys(keys, captions, [every for chunk in chunks for every in chunk.known])
        at_once = max(1, self._token_budget // self._image_tokens)
        places = [np.arange(first, min(first + at_once, filled)) for first in range(0, filled, at_once)]
        images = ImageGroup(pixels[:filled], self._image_tokens, places)
        # Fresh memory costs as much as filling it.
        weakref.finalize(images, self._free.append, pixels).atexit = False
        cut = pack(tokens.lengths, self._token_budget, padded=self._padded, device=self._device)
        groups: list[Any] = [images, TextGroup("document", tokens, cut)]
        whole = self._share.size == 1
        masks = texts.false_negatives() if whole else None
        return PreparedBatch(groups, filled, masks, self._padded, None if whole else texts)

    def _keys(self, keys: list[str], captions: list[str], known: list[tuple[str, ...]]) -> PairKeys:
        """Of images, their captions, and all captions that these images are known to have."""
        images, texts = digests(keys), digests(captions)
        of_image = np.repeat(images, [len(some) for some in known])
        pairs = np.stack([of_image, digests(text for some in known for text in some)], axis=1)
        if self._known is not None and self._share.size == 1:
            pairs = np.concatenate([pairs, self._known.pairs(images, texts)])
        return PairKeys(images, texts, np.empty(0, np.int64), pairs)

    @property
    def known(self) -> KnownPositives | None:
        """The captions of images that several rows show, where any has."""
        return self._known

    def _count(self, source: int, rows: int, broken: list[str]) -> None:
        reader = self._readers[source]
        before = self._broken[source]
        self._read[source] += rows
        self._broken[source] += len(broken)
        for number, line in enumerate(broken, start=before + 1):
            # All of the first few, and then ever fewer.
            if number <= 10 or number & (number - 1) == 0:
                self._say(f"{line} (pair left out: number {number} of {self._read[source]:,} read)")
        if broken:
            counts = self._broken[source], self._read[source]
            check_broken(reader.source.name, *counts, reader.max_broken, f"the last: {broken[-1]}")


def _joined(parts: list[TokenizedTexts]) -> TokenizedTexts:
    lengths = np.concatenate([part.lengths for part in parts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenizedTexts(np.concatenate([part.ids for part in parts]), offsets)
