"""Where hard negatives are searched: an embedding store (exactly), or one or several indexes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from index.ann.layout import PASSAGES_FILE
from index.ann.multi_index import MultiIndex
from index.exact import search as exact
from index.files import InputError, atomic_path
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from index.ties import order_ties
from retriever.data.table import ExampleTable
from retriever.mining.texts import PassageTexts, text_key

Progress = Callable[[int], None] | None


class Corpus(Protocol):
    """Passages that can be searched, and whose texts and vectors can be read by row."""

    texts: PassageTexts

    def search(self, queries: np.ndarray, k: int, progress: Progress = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows [Q, k], best first. Missing results have row −1 and come last."""

    def products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """Return the inner product of each query [P, D] with the passage of its row [P]; None without vectors."""


class StoreCorpus:
    """The passages of an embedding store, searched exactly.

    Args:
        store: The store, whose files are verified.
        device: Where products are computed.
        reporter: Shows the progress of reading the texts.
    """

    def __init__(self, store: EmbeddingStore, device: Any, reporter: Reporter) -> None:
        store.check()
        self.store, self.device = store, device
        with reporter.bar("read texts", store.rows, "passages") as advance:
            self.texts = PassageTexts(store.files("jsonl"), advance)
        if len(self.texts) != store.rows:
            raise InputError(f"{store.folder}: expected {store.rows} passages, found {len(self.texts)}")
        self._ids = store.ids()

    def search(self, queries: np.ndarray, k: int, progress: Progress = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact scores and rows [Q, min(k, N)]. `progress` is called with the rows searched."""
        return exact.search(queries, self.store.shards(), self._ids, k, device=self.device, progress=progress)

    def products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the inner products [P], rounded as those of the search."""
        return store_products(self.store, queries, rows)


class IndexCorpus:
    """The passages of indexes.

    Args:
        index: The index, opened.
        store: The embedding store that it was built from, for exact scores. None: the scores of the index are used.
        reporter: Shows the progress of reading the texts.

    Raises:
        InputError: The store has other passages than the index.
    """

    def __init__(self, index: Any, store: EmbeddingStore | None, reporter: Reporter) -> None:
        self.index, self.store = index, store
        indexes = index.indexes if isinstance(index, MultiIndex) else [index]
        with reporter.bar("read texts", index.rows, "passages") as advance:
            self.texts = PassageTexts([part.folder / PASSAGES_FILE for part in indexes], advance)
        if store is None:
            reporter.line(f"{index.folder}: candidates have the scores of the index; --embeddings gives exact scores")
            return
        store.check()
        index.check_model(store.model)
        if store.rows != index.rows or any(a != b for a, b in zip(store.ids(), index.ids, strict=True)):
            raise InputError(f"{store.folder}: expected the store that {index.folder} was built from, found another")

    def search(self, queries: np.ndarray, k: int, progress: Progress = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows [Q, min(k, N)], with exact scores if there is a store."""
        scores, rows = self.index.search_rows(queries, k)
        if self.store is not None:
            query, rank = np.nonzero(rows >= 0)
            scores[query, rank] = store_products(self.store, queries[query], rows[query, rank])
            order = np.argsort(-scores, axis=1, kind="stable")
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
            order_ties(scores, rows, self.index.ids)
        return scores, rows

    def products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """Return the inner products [P]; None without a store."""
        return None if self.store is None else store_products(self.store, queries, rows)


def store_products(store: EmbeddingStore, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the inner product of each query [P, D] with the vector of its row [P], float32 [P]."""
    products = np.empty(len(rows), np.float32)
    for first, vectors in store.shards():
        for positions in _blocks(np.flatnonzero((rows >= first) & (rows < first + len(vectors)))):
            passages = vectors[rows[positions] - first].astype(np.float64)
            products[positions] = np.einsum("pd,pd->p", queries[positions].astype(np.float64), passages)
    return products


def _blocks(positions: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(positions), 2**14):
        yield positions[start : start + 2**14]


def write_union(table: ExampleTable, path: Path, progress: Progress = None) -> int:
    """Write the distinct positives and negatives of a table as a corpus file; ids are numbers from 0.

    Texts that differ only in case and white space are one passage. Keys of the texts are held in memory, about 100
    bytes per passage.

    Returns:
        The number of passages.
    """
    from json import dumps

    known: set[int] = set()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in range(len(table)):
            example = table[row]
            for text in (*example.positives, *example.negatives):
                if (key := text_key(text)) not in known:
                    stream.write(dumps({"_id": str(len(known)), "text": text}, ensure_ascii=False) + "\n")
                    known.add(key)
            if progress is not None:
                progress(1)
    return len(known)
