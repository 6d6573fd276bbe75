"""Batches of pictures and captions: worker processes read and decode a chunk of a batch at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from index.files import InputError
from retriever.data.batches import PairDigests, false_negative_ids
from retriever.data.schedule import BatchSchedule, Share
from retriever.images.features import FeatureStore
from retriever.images.sources import BrokenPairError, PairSource
from retriever.images.transforms import ImageTransform
from retriever.interrupt import leave_signals_to_the_parent
from retriever.packing import pack
from retriever.prepare import PreparedBatch, TextGroup
from retriever.tokens import TextTokenizer, TokenizedTexts

if TYPE_CHECKING:
    from retriever.images.towers import ImageTextTowers

# Pairs that a worker hands over at once: some MiB of pixels, so that many workers share one large batch.
CHUNK = 128
# Beside the keys in data/schedule.py and data/batches.py: crops, and which caption a row shows.
_PAIR = 4


@dataclass(frozen=True)
class ImageGroup:
    """The pictures of a batch, on the host; micro-batches of them visit the device one after another."""

    pixels: Tensor
    """uint8 [n, 3, height, width]; or, of a locked tower, what its encoder made of them: float16 [n, width]."""
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

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> Tensor:
        """Embeddings [rows, dimension]."""
        return towers.embed_pixels(self.pixels[int(rows[0]) : int(rows[-1]) + 1])


@dataclass(frozen=True)
class PairChunk:
    """What a worker made of some rows of a batch: the pairs that could be read."""

    pictures: Tensor
    """As `ImageGroup.pixels`."""
    tokens: TokenizedTexts
    keys: list[str]
    captions: list[str]
    broken: list[str]
    """One line for each pair that is left out."""


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
    features: FeatureStore | None = None
    """Of a locked tower, instead of pixels."""

    def __call__(self, rows: Sequence[int], seeds: Sequence[list[int]]) -> PairChunk:
        """The pairs of these rows; a seed decides on the crop and on the caption."""
        pictures: list[Tensor] = []
        keys, captions, broken = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            chance = np.random.default_rng(seed)
            try:
                pair = self.source.read(row, self.features is None)
                if self.features is not None:
                    pictures.append(self.features.read(row, pair.place))
                elif self.augment:
                    pictures.append(self.transform.augmented(pair.open(), chance))
                else:
                    pictures.append(self.transform.pixels(pair.open()))
            except BrokenPairError as error:
                broken.append(str(error))
                continue
            keys.append(pair.key)
            captions.append(pair.captions[chance.integers(len(pair.captions))])
        texts = [self.prompt + caption for caption in captions]
        # Tokenizers fail on no texts at all.
        tokens = self.tokenizer(texts) if texts else TokenizedTexts(np.empty(0, np.int32), np.zeros(1, np.int64))
        return PairChunk(torch.stack(pictures) if pictures else torch.empty(0), tokens, keys, captions, broken)


class _Chunks(Dataset[PairChunk]):
    """Chunk by chunk, the batches of all steps; in whichever process asks for them."""

    def __init__(self, readers: Sequence[PairReader], schedule: BatchSchedule, share: Share) -> None:
        self.readers, self.schedule = list(readers), schedule
        self.places = share.of(schedule.batch_size)

    @property
    def a_batch(self) -> int:
        """Chunks of one batch."""
        return -(-len(self.places) // CHUNK)

    def __len__(self) -> int:
        return len(self.schedule) * self.a_batch

    def __getitem__(self, number: int) -> PairChunk:
        step, chunk = divmod(number, self.a_batch)
        source, rows = self.schedule.rows(step)
        mine = self.places[chunk * CHUNK : (chunk + 1) * CHUNK]
        seeds = [[self.schedule.seed, _PAIR, step, place] for place in mine]
        return self.readers[source](rows[mine.start : mine.stop].tolist(), seeds)


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
        say: Callable[[str], None],
        share: Share | None = None,
    ) -> None:
        """Batches over the readers' sources, in the order of `schedule`; `say` prints what is left out. `share`: of
        each batch the part of one process, none for the whole; only its pairs are read."""
        self._readers = list(readers)
        self._share = share or Share()
        self._chunks = _Chunks(readers, schedule, self._share)
        self._schedule = schedule
        self._image_tokens = image_tokens
        self._token_budget = token_budget
        self._padded = padded
        self._say = say
        self._read = [0] * len(self._readers)
        self._broken = [0] * len(self._readers)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._schedule)

    def loader(self, *, start: int = 0, workers: int = 0) -> Iterator[PreparedBatch]:
        """The batches from step `start`, each decoded while the one before it is used.

        Two batches of pixels are in the host's memory at a time.

        Raises:
            InputError: more pairs of a source are broken than it allows.
        """
        chunks = DataLoader(
            self._chunks,
            batch_size=None,
            sampler=range(start * self._chunks.a_batch, len(self._chunks)),
            num_workers=workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),
            prefetch_factor=2 if workers else None,
            worker_init_fn=leave_signals_to_the_parent if workers else None,
        )
        stream, left = iter(chunks), threading.Event()
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

    def _assemble(self, stream: Iterator[PairChunk], step: int, left: threading.Event) -> PreparedBatch:
        """The next batch of the stream, which is that of `step`."""
        source, _ = self._schedule.rows(step)
        rows = self._chunks.places
        pixels, filled = torch.empty(0), 0
        chunks: list[PairChunk] = []
        for _ in range(self._chunks.a_batch):
            if left.is_set():
                break
            chunk = next(stream)
            chunks.append(chunk)
            if len(chunk.keys):
                if not filled:
                    pixels = torch.empty(len(rows), *chunk.pictures.shape[1:], dtype=chunk.pictures.dtype)
                pixels[filled : filled + len(chunk.keys)] = chunk.pictures
                filled += len(chunk.keys)
        self._count(source, len(rows), [line for chunk in chunks for line in chunk.broken])
        if not filled:
            raise InputError(f"{self._readers[source].source.name}: no pair of step {step + 1} can be read")
        tokens = _joined([chunk.tokens for chunk in chunks])
        keys = [key for chunk in chunks for key in chunk.keys]
        captions = [caption for chunk in chunks for caption in chunk.captions]
        query_ids, passage_ids = false_negative_ids(keys, captions, [])
        at_once = max(1, self._token_budget // self._image_tokens)
        places = [np.arange(first, min(first + at_once, filled)) for first in range(0, filled, at_once)]
        groups: list[Any] = [
            ImageGroup(pixels[:filled], self._image_tokens, places),
            TextGroup("document", tokens, pack(tokens.lengths, self._token_budget, padded=self._padded)),
        ]
        digests = PairDigests.of(keys, captions, []) if self._share.size > 1 else None
        return PreparedBatch(groups, filled, query_ids, passage_ids, self._padded, digests)

    def _count(self, source: int, rows: int, broken: list[str]) -> None:
        reader = self._readers[source]
        before = self._broken[source]
        self._read[source] += rows
        self._broken[source] += len(broken)
        for number, line in enumerate(broken, start=before + 1):
            # All of the first few, and then ever fewer.
            if number <= 10 or number & (number - 1) == 0:
                self._say(f"{line} (pair left out: number {number} of {self._read[source]:,} read)")
        found, allowed = self._broken[source], max(100, reader.max_broken * self._read[source])
        if found > allowed:
            raise InputError(
                f"{reader.source.name}: {found} of {self._read[source]:,} pairs are broken, more than max_broken "
                f"({reader.max_broken:g}) allows; the last: {broken[-1]}"
            )


def _joined(parts: list[TokenizedTexts]) -> TokenizedTexts:
    lengths = np.concatenate([part.lengths for part in parts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenizedTexts(np.concatenate([part.ids for part in parts]), offsets)


def _unchanged(chunk: Any) -> Any:
    return chunk
