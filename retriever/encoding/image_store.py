"""Encoding of images into an embedding store, which can be indexed and searched like a corpus."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from index.files import InputError
from index.passages import Passage
from index.progress import Reporter
from index.records import read_records
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.image_encoder import DECODE_BATCH, ImageDecoder, embed_pixels
from retriever.encoding.image_items import ImageItems
from retriever.encoding.left_out import LEFT_OUT, write_left_out
from retriever.models.images.towers import ImageTextTowers
from retriever.utils.check_progress import checksum_progress

# Unreadable images that are named.
SHOWN_BROKEN = 3
# Batches that are read and decoded in advance.
PREFETCHED = 2


def encode_images(
    towers: ImageTextTowers,
    items: ImageItems,
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32",
    shard_rows: int = 65536,
    ranks: Ranks | None = None,
) -> EmbeddingStore:
    """Embed images into the store `out`; an incomplete store is continued.

    Unreadable images are left out; the first ones are named, and OUT/left_out.jsonl names all. Several ranks decode and
    embed parts of the images, and the first rank writes them. The store does not depend on their number.

    Args:
        towers: the model in evaluation mode, on the device to use.
        items: the images, the same on all ranks.
        out: the folder of the store.
        options: precision, and the number of tokens (image patches) per forward pass.
        reporter: shows progress and names unreadable images.
        dtype: dtype of the vectors on disk.
        shard_rows: rows per shard.
        ranks: all ranks. Default: None, one process.

    Raises:
        InputError: no image is readable, or `out` holds something else.
        RanksDifferError: the ranks have different models, images, options or folders.
    """
    ranks = ranks or Ranks()
    model = towers.fingerprint()
    check_same_on_ranks(
        ranks,
        {
            "model": ContentHash.of(model),
            "data": f"{items.name}, {len(items):,} images",
            "precision": options.precision,
            "dtype": dtype,
            "shard_rows": shard_rows,
        },
    )
    check_same_folder(ranks, "out", out)
    for notice in items.notices:
        reporter.line(f"{items.name}: {notice}")
    with contextlib.ExitStack() as stack:
        writer = None
        if ranks.is_first:
            with reporter.bar(f"read {items.name}", len(items), "images") as advance:
                sha256 = items.sha256(advance)
            writer = EmbeddingWriter(
                out,
                dim=towers.dimension,
                dtype=dtype,
                model=model,
                source={"name": items.name, "sha256": sha256, "precision": options.precision},
                shard_rows=shard_rows,
                checked=stack.enter_context(checksum_progress(reporter, [out])),
            )
            stack.enter_context(writer)
        done, complete = ranks.broadcast(writer and [_items_done(writer, items), writer.complete])
        if not complete:
            store = None if writer is None else _Store(writer, _left_out_before(out, done))
            with reporter.bar(f"encode {items.name}", len(items), "images") as advance:
                advance(done)
                for group in _embedded(towers, items, done, options, ranks):
                    for batch in group:
                        if store is not None:
                            store.add(batch, done)
                        advance(batch.items - max(0, done - batch.start))
            if store is not None:
                _finish(store, items, reporter)
    ranks.barrier()
    return EmbeddingStore.open(out)


@dataclass(frozen=True)
class _Batch:
    """Consecutive images: those that can be read, with their embeddings, and those that cannot."""

    start: int
    """Number of the first image."""
    items: int
    """Number of images."""
    rows: list[int] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    vectors: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    broken: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Number of an image -> its id and the reason."""


class _Store:
    """The writer of the first rank, and the images that were left out."""

    def __init__(self, writer: EmbeddingWriter, broken: dict[int, tuple[str, str]]) -> None:
        self.writer, self.broken = writer, broken
        self.rows = writer.rows

    def add(self, batch: _Batch, done: int) -> None:
        """Append the images of a batch from image number `done` on."""
        self.broken.update(batch.broken)
        new = [position for position, row in enumerate(batch.rows) if row >= done]
        if new:
            before = self.writer.rows
            self.writer.append([batch.passages[position] for position in new], batch.vectors[new])
            self.rows += len(new)
            if self.writer.rows != before:
                self.write_left_out()

    def write_left_out(self) -> None:
        """Write the file with the images that were left out, if there are any."""
        if not self.broken:
            return
        rows = ({"row": row, "id": id_, "reason": reason} for row, (id_, reason) in sorted(self.broken.items()))
        write_left_out(self.writer.folder, rows)


def _finish(store: _Store, items: ImageItems, reporter: Reporter) -> None:
    """Name the images that were left out, and complete the store."""
    for id_, reason in itertools.islice(store.broken.values(), SHOWN_BROKEN):
        reporter.line(f"{items.name}: left out: {id_}: {reason}")
    store.write_left_out()
    if len(store.broken) > SHOWN_BROKEN:
        named = store.writer.folder / LEFT_OUT
        reporter.line(f"{items.name}: {len(store.broken):,} images left out in all, named in {named}")
    if store.rows == 0:
        raise InputError(f"{items.name}: expected images, found none that can be read")
    store.writer.close()


def _items_done(writer: EmbeddingWriter, items: ImageItems) -> int:
    """The number of images up to the last one in the store. Images that were left out have no row in it."""
    if not writer.rows or writer.complete:
        return len(items) if writer.complete else 0
    last = writer.ids_on_disk()[writer.rows - 1]
    return next(row + 1 for row in range(writer.rows - 1, len(items)) if items.passage(row).id == last)


def _left_out_before(out: Path, done: int) -> dict[int, tuple[str, str]]:
    """The images that an earlier run has left out, before image number `done`."""
    if not done or not (out / LEFT_OUT).is_file():
        return {}
    found: dict[int, tuple[str, str]] = {}
    for record in read_records(out / LEFT_OUT):
        row, id_, reason = (record.fields.get(name) for name in ("row", "id", "reason"))
        if not isinstance(row, int) or not isinstance(id_, str) or not isinstance(reason, str):
            raise InputError(f"{record.place}: expected row, id and reason of an image, found {record.fields!r:.60}")
        if row < done:
            found[row] = (id_, reason)
    return found


def _embedded(
    towers: ImageTextTowers, items: ImageItems, done: int, options: EncodeOptions, ranks: Ranks
) -> Iterator[list[_Batch]]:
    """Yield the next batch of each rank in order, from the batch with image number `done` on.

    Batches begin at multiples of DECODE_BATCH, so that the embeddings depend on nothing else.
    """
    first = done // DECODE_BATCH * DECODE_BATCH
    starts = list(range(first, len(items), DECODE_BATCH))
    rounds = -(-len(starts) // ranks.world_size)
    own = [starts[n] for n in range(ranks.rank, len(starts), ranks.world_size)]
    with ImageDecoder(towers) as decoder, ThreadPoolExecutor(1) as reader:
        # While a batch is embedded, the next one is decoded and the one after it is read, so that the threads that
        # decode do not wait. One thread reads: the files of `items` are not for several.
        pending = deque(reader.submit(_read, decoder, items, start) for start in own[:PREFETCHED])
        for number in range(rounds):
            batch = None
            if pending:
                decoded, pixels = _decoded(*pending.popleft().result())
                pending.extend(
                    reader.submit(_read, decoder, items, start)
                    for start in own[number + PREFETCHED : number + PREFETCHED + 1]
                )
                batch = replace(decoded, vectors=embed_pixels(towers, pixels, options))
            yield _gathered(ranks, batch, towers.dimension)


def _read(
    decoder: ImageDecoder, items: ImageItems, start: int
) -> tuple[_Batch, dict[int, Passage], Callable[[], list[Tensor | str]]]:
    """Read a batch and start to decode it: the images that cannot be read, the passages of the others, their pixels."""
    rows = range(start, min(start + DECODE_BATCH, len(items)))
    batch = _Batch(start, len(rows))
    passages: dict[int, Passage] = {}
    sources: list[tuple[bytes | Path, str]] = []
    for row in rows:
        passage = items.passage(row)
        try:
            sources.append((items.read(row), passage.id))
        except InputError as error:
            batch.broken[row] = (passage.id, str(error))
        else:
            passages[row] = passage
    return batch, passages, decoder.submit(sources)


def _decoded(
    batch: _Batch, passages: dict[int, Passage], outcomes: Callable[[], list[Tensor | str]]
) -> tuple[_Batch, list[Tensor]]:
    """Wait for a batch: its images without their embeddings, and the pixels of those that can be read."""
    pixels = []
    for (row, passage), outcome in zip(passages.items(), outcomes(), strict=True):
        if isinstance(outcome, str):
            batch.broken[row] = (passage.id, outcome)
        else:
            batch.rows.append(row)
            batch.passages.append(passage)
            pixels.append(outcome)
    return batch, pixels


def _gathered(ranks: Ranks, batch: _Batch | None, dim: int) -> list[_Batch]:
    """The batches of all ranks, on all ranks."""
    if ranks.world_size == 1:
        return [] if batch is None else [batch]
    about = None if batch is None else {**asdict(replace(batch, vectors=np.empty(0))), "vectors": None}
    flat = np.empty(0, np.float32) if batch is None else batch.vectors.reshape(-1)
    gathered = zip(ranks.all_gather(about), ranks.all_gather_rows(flat), strict=True)
    return [
        _Batch(
            each["start"],
            each["items"],
            each["rows"],
            [Passage(**passage) for passage in each["passages"]],
            vectors.reshape(-1, dim),
            {int(row): tuple(why) for row, why in each["broken"].items()},
        )
        for each, vectors in gathered
        if each is not None
    ]
