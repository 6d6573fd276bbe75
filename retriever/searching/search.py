"""Search of an index with queries that are texts or images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.fields.filters import Filter
from index.fields.values import FieldValue
from index.files import InputError
from index.passages import heading
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import embed_images
from retriever.models.modality import embeds_images
from retriever.models.towers import Towers

# Queries per batch.
BATCH = 256


@dataclass(frozen=True)
class Result:
    """A retrieved passage."""

    rank: int
    """Rank, from 1."""
    score: float
    """Inner product with the query."""
    id: str
    title: str
    text: str
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    """Fields of the passage that the index keeps."""

    @property
    def heading(self) -> str:
        """The title to show; empty if it equals the text."""
        return heading(self.title, self.text)


@dataclass(frozen=True)
class Answer:
    """A query and its results, best first."""

    id: str
    query: str
    results: list[Result]


def search(
    towers: Towers,
    index: Index | MultiIndex,
    queries: Iterable[tuple[str, str | Path]],
    k: int,
    options: EncodeOptions,
    batch: int = BATCH,
    filter: Filter | None = None,
) -> Iterator[Answer]:
    """Yield the best `k` passages of each query, in order; fewer if the index returns fewer.

    Args:
        towers: the model that embedded the passages of the index, in evaluation mode.
        index: one index, or several searched as one.
        queries: (id, text) without prompts, or (id, image file); consumed in batches as answers are taken.
        k: passages per query.
        options: precision and micro-batch size.
        batch: queries per batch; with 1, each query is answered before the next is read.
        filter: only passages that match.

    Raises:
        InputError: the index was built with another model, an image cannot be read, or the model does not embed
            images.
    """
    index.check_model(towers.fingerprint())
    stream = iter(queries)
    while pairs := list(itertools.islice(stream, batch)):
        vectors = embed_queries(towers, [query for _, query in pairs], options)
        for (id_, query), scores, rows in zip(pairs, *index.search_rows(vectors, k, filter), strict=True):
            yield Answer(id_, str(query), results_of(index, scores, rows))


def embed_queries(towers: Towers, queries: Sequence[str | Path], options: EncodeOptions) -> np.ndarray:
    """Embed queries, in their order, as float32 [M, D]: texts, and image files given as Path.

    Raises:
        InputError: a file cannot be read, or the model does not embed images.
    """
    images = {row: query for row, query in enumerate(queries) if isinstance(query, Path)}
    texts = {row: query for row, query in enumerate(queries) if isinstance(query, str)}
    if images and not embeds_images(towers):
        file = next(iter(images.values()))
        raise InputError(f"{file}: expected a model of images and texts, found a model of texts")
    vectors = np.empty((len(queries), towers.dimension), dtype=np.float32)
    vectors[list(texts)] = embed_texts(towers, list(texts.values()), "query", options)
    if embeds_images(towers):
        vectors[list(images)] = embed_images(towers, list(images.values()), options)
    return vectors


def results_of(index: Index | MultiIndex, scores: np.ndarray, rows: np.ndarray) -> list[Result]:
    """Look up the passages of one query: scores [k] and rows [k], padded with row -1."""
    results: list[Result] = []
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        if row >= 0:
            passage = index.passage(row)
            results.append(Result(len(results) + 1, score, passage.id, passage.title, passage.text, passage.fields))
    return results
