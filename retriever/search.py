"""Queries to passages through an index."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from index.faiss_index import Index
from index.several import Indexes
from retriever.encode import EncodeOptions, embed_texts
from retriever.towers import Towers

# Queries embedded and searched at a time.
BATCH = 256


@dataclass(frozen=True)
class Result:
    """A passage found."""

    rank: int
    """From 1."""
    score: float
    """Inner product with the query."""
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A query and what was found for it, best first."""

    id: str
    query: str
    results: list[Result]


def search(
    towers: Towers,
    index: Index | Indexes,
    queries: Iterable[tuple[str, str]],
    k: int,
    options: EncodeOptions,
    batch: int = BATCH,
) -> Iterator[Answer]:
    """The best `k` passages of each (id, text) query, in order; fewer where the index finds fewer.

    Args:
        towers: in evaluation mode: the model that embedded the index's passages.
        index: the index, or several searched as one.
        queries: (id, text), without prompts; consumed in batches as answers are taken.
        k: passages a query.
        options: how queries pass through the tower.
        batch: queries embedded and searched at a time; 1 answers each before the next is read.

    Raises:
        InputError: the index was made with another model.
    """
    index.check_model(towers.fingerprint())
    stream = iter(queries)
    while some := list(itertools.islice(stream, batch)):
        vectors = embed_texts(towers, [text for _, text in some], "query", options)
        for (name, text), scores, rows in zip(some, *index.search(vectors, k), strict=True):
            found = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
            yield Answer(name, text, [_result(index, *place, rank) for rank, place in enumerate(found, start=1)])


def _result(index: Index | Indexes, score: float, row: int, rank: int) -> Result:
    passage = index.passage(row)
    return Result(rank, score, passage.id, passage.title, passage.text)
