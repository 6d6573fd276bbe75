"""The corpus and the queries of a BEIR folder as vectors, with bars; evaluation and mining begin with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.beir import BeirDataset, beir_file
from index.embeddings import EmbeddingStore
from index.records import count_records
from retriever.encode import EncodeOptions, corpus_source, embed_texts, encode_passages
from retriever.progress import Terminal
from retriever.towers import Towers

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
    dataset: BeirDataset,
    folder: Path,
    options: EncodeOptions,
    terminal: Terminal,
    *,
    tick: Tick = None,
) -> EmbeddingStore:
    """The corpus in a store in `folder`, which is continued or used again if it is there."""
    corpus = beir_file(dataset.folder, "corpus.jsonl")
    total = count_records(corpus) if terminal.is_live else None
    with terminal.bar(f"{dataset.name}: corpus", total, "passages") as advance:
        return encode_passages(
            towers,
            dataset.passages(),
            folder,
            options,
            source=corpus_source(corpus),
            progress=ticking(advance, tick),
        )


def embed_queries(
    towers: Towers, texts: Sequence[str], options: EncodeOptions, terminal: Terminal, *, tick: Tick = None
) -> np.ndarray:
    """Vectors of queries, float32 [texts, dimension]."""
    with terminal.bar("queries", len(texts), "queries") as advance:
        return embed_texts(towers, texts, "query", options, ticking(advance, tick))
