"""Queries, texts or pictures, to passages or pictures through an index."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index.ann.index import Index
from index.ann.layout import FAISS_FILE, LISTS_FILE
from index.ann.multi_index import MultiIndex, open_all
from index.files import InputError
from index.passages import heading
from index.progress import Reporter
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import embed_images
from retriever.models.images.towers import ImageTextTowers
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress

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

    @property
    def heading(self) -> str:
        """The title, unless it says no more than the text."""
        return heading(self.title, self.text)


@dataclass(frozen=True)
class Answer:
    """A query and what was found for it, best first."""

    id: str
    query: str
    results: list[Result]


def open_indexes(
    folders: Sequence[Path], reporter: Reporter, *, mmap: bool = False, verify: bool = False
) -> Index | MultiIndex:
    """The index in the one folder, or those in several as one.

    Args:
        folders: of the indexes.
        reporter: shows how much has been checked.
        mmap: leave them on disk and read what a search touches.
        verify: check every byte of every file first; else of the faiss files that are read whole or take little time,
            and of the others the length.

    Raises:
        InputError: as `index.ann.multi_index.open_all`, or a file is damaged.
    """
    with checksum_progress(reporter, folders, None if verify else [FAISS_FILE, LISTS_FILE]) as checked:
        return open_all(folders, verify="hash" if verify else "size", mmap=mmap, progress=checked)


def search(
    towers: Towers,
    index: Index | MultiIndex,
    queries: Iterable[tuple[str, str | Path]],
    k: int,
    options: EncodeOptions,
    batch: int = BATCH,
) -> Iterator[Answer]:
    """The best `k` passages of each (id, text) query, in order; fewer where the index finds fewer.

    Args:
        towers: in evaluation mode: the model that embedded the index's passages.
        index: the index, or several searched as one.
        queries: (id, text), without prompts, or (id, file of a picture); consumed in batches as answers are taken.
        k: passages a query.
        options: how queries pass through the tower.
        batch: queries embedded and searched at a time; 1 answers each before the next is read.

    Raises:
        InputError: the index was made with another model, or a picture cannot be read or is none that the model embeds.
    """
    index.check_model(towers.fingerprint())
    stream = iter(queries)
    while some := list(itertools.islice(stream, batch)):
        vectors = embed_queries(towers, [query for _, query in some], options)
        for (name, query), scores, rows in zip(some, *index.search_rows(vectors, k), strict=True):
            found = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
            yield Answer(name, str(query), [_result(index, *place, rank) for rank, place in enumerate(found, start=1)])


def embed_queries(towers: Towers, queries: Sequence[str | Path], options: EncodeOptions) -> np.ndarray:
    """Vectors, float32 [queries, dimension], of texts and of files of pictures, in their order.

    Raises:
        InputError: a file cannot be read, or the model embeds no pictures.
    """
    files = [row for row, query in enumerate(queries) if isinstance(query, Path)]
    pictures = [query for query in queries if isinstance(query, Path)]
    if pictures and not isinstance(towers, ImageTextTowers):
        raise InputError(f"{pictures[0]}: expected a model of pictures and texts, found one of texts alone")
    texts = [row for row, query in enumerate(queries) if not isinstance(query, Path)]
    vectors = np.empty((len(queries), towers.dimension), dtype=np.float32)
    vectors[texts] = embed_texts(towers, [str(queries[row]) for row in texts], "query", options)
    if isinstance(towers, ImageTextTowers):
        vectors[files] = embed_images(towers, pictures, options)
    return vectors


def _result(index: Index | MultiIndex, score: float, row: int, rank: int) -> Result:
    passage = index.passage(row)
    return Result(rank, score, passage.id, passage.title, passage.text)
