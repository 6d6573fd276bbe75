"""Corpora and queries as vectors, with bars and counted warnings: what encoding, evaluation and mining begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from index.passages import PassageFile
from index.progress import Reporter
from index.records import count_records
from index.store.reader import EmbeddingStore
from retriever.data.sources import Notices
from retriever.distributed.ranks import Ranks
from retriever.encoding.corpus import corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.windows import WINDOW
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress

Tick = Callable[[], None] | None
"""Called after every micro-batch; may raise to end the work."""


def ticking(advance: Callable[[int], None], tick: Tick) -> Callable[[int], None]:
    """A progress function that also ticks."""

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
    dtype: Literal["float32", "float16"] = "float32",
    shard_rows: int = 65536,
    window: int = WINDOW,
    workers: int = 0,
    tick: Tick = None,
    ranks: Ranks | None = None,
    same_model: bool = False,
) -> EmbeddingStore:
    """The passages of a file in a store in `folder`, which is continued or used again if it is there; by all ranks.

    `same_model` is as in `encode_passages`.

    Raises:
        InputError: the file or a row of it is bad or there is none, or `folder` holds something else.
    """
    notices = Notices()
    total = count_records(corpus) if reporter.is_live else None
    with (
        checksum_progress(reporter, [folder]) as checked,
        reporter.bar(f"encode {corpus.name}", total, "passages") as advance,
    ):
        store = encode_passages(
            towers,
            PassageFile(corpus),
            folder,
            options,
            source=corpus_source(corpus),
            dtype=dtype,
            shard_rows=shard_rows,
            window=window,
            workers=workers,
            ranks=ranks,
            same_model=same_model,
            progress=ticking(advance, tick),
            notice=notices.add,
            checked=checked,
        )
    for notice in notices.lines():
        reporter.line(f"{corpus.name}: {notice}")
    return store


def embed_queries(
    towers: Towers, texts: Sequence[str], options: EncodeOptions, reporter: Reporter, *, tick: Tick = None
) -> np.ndarray:
    """Vectors of queries, float32 [texts, dimension]."""
    with reporter.bar("encode queries", len(texts), "queries") as advance:
        return embed_texts(towers, texts, "query", options, ticking(advance, tick))
