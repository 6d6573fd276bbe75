"""Encoding of corpus files and queries with progress bars and counted notices, for encoding, evaluation and mining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from index.fields.values import check_field_names
from index.files.disk_space import check_free_space
from index.passages import PassageFile
from index.progress import Reporter
from index.records import count_records
from index.store.reader import EmbeddingStore
from index.store.shards import row_bytes
from retriever.data.sources import Notices
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import StoreOptions, corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.left_out import broken_rows, write_left_out
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress

Tick = Callable[[], None] | None
"""Called after every micro-batch; may raise to stop the work."""


def ticking(advance: Callable[[int], None], tick: Tick) -> Callable[[int], None]:
    """Return a progress callback that calls `advance` and then `tick`."""

    def progress(count: int) -> None:
        advance(count)
        if tick is not None:
            tick()

    return progress


def embed_corpus(
    towers: Towers,
    corpus: Path,
    folder: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    storage: StoreOptions | None = None,
    tick: Tick = None,
    ranks: Ranks | None = None,
    same_model: bool = False,
    fields: Sequence[str] = (),
    skip_broken: bool = False,
) -> EmbeddingStore:
    """Embed the passages of a file into a store in `folder`, which is continued or reused if it exists.

    Args:
        towers: the model in evaluation mode, on the device to use.
        corpus: the file of passages.
        folder: the folder of the store.
        options: precision and micro-batch size.
        reporter: shows progress and counted notices.
        storage: see `encode_passages`.
        tick: called after every micro-batch; may raise to stop the work.
        ranks: see `encode_passages`.
        same_model: see `encode_passages`.
        fields: fields of the passages to keep.
        skip_broken: leave out rows that cannot be read, which are counted, named in LEFT_OUT, and part of what
            identifies the corpus in the manifest. By default, the first one is an error.

    Raises:
        InputError: the file is missing, empty or has an invalid row, `folder` holds something else, or its disk is too
            small.
    """
    check_field_names(corpus, fields)
    notices = Notices()
    is_first = ranks is None or ranks.is_first
    total = count_records(corpus) if reporter.is_live or is_first else None
    source, broken = corpus_source(corpus, fields), dict[int, str]()
    if skip_broken:
        with reporter.bar(f"check {corpus.name}", total, "passages") as advance:
            broken = broken_rows(corpus, fields, advance)
        if broken:
            source["left_out"] = f"{len(broken)} rows"
        total = None if total is None else max(0, total - len(broken))
    if is_first and total is not None:
        needed = total * row_bytes((storage or StoreOptions()).dtype, towers.dimension) + corpus.stat().st_size
        check_free_space(folder, needed, f"{total:,} embeddings and their texts", replaces=folder)
    with (
        checksum_progress(reporter, [folder]) as checked,
        reporter.bar(f"encode {corpus.name}", total, "passages") as advance,
    ):
        store = encode_passages(
            towers,
            PassageFile(corpus, fields, broken),
            folder,
            options,
            source=source,
            storage=storage,
            ranks=ranks,
            same_model=same_model,
            progress=ticking(advance, tick),
            notice=notices.add,
            checked=checked,
        )
    if broken and is_first:
        file = write_left_out(folder, ({"row": row, "reason": reason} for row, reason in broken.items()))
        reporter.line(
            f"{corpus.name}: {len(broken):,} rows left out, named in {file}; the first: {next(iter(broken.values()))}"
        )
    for notice in notices.lines():
        reporter.line(f"{corpus.name}: {notice}")
    return store


def embed_queries(
    towers: Towers, texts: Sequence[str], options: EncodeOptions, reporter: Reporter, *, tick: Tick = None
) -> np.ndarray:
    """Embed queries with a progress bar, float32 [M, D]."""
    with reporter.bar("encode queries", len(texts), "queries") as advance:
        return embed_texts(towers, texts, "query", options, ticking(advance, tick))
