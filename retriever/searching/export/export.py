"""Writing a store to another engine, in batches, and checking what arrived."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np

from index.exact.search import search
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.row_numbers import RowNumberIds
from retriever.searching.export.engines import ENGINES, Engine

BATCH = 1000
# Vectors of the store whose neighbors are compared.
SAMPLE = 20
K = 10
# Scores of engines differ from the exact ones by rounding.
TOLERANCE = 1e-5


def export_store(
    store: EmbeddingStore,
    engine: str,
    where: str,
    name: str = "passages",
    *,
    batch: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the vectors, ids and passages of a store to another engine, and verify them there.

    An interrupted export continues where it stopped, and a complete one changes nothing. Afterwards the number of rows,
    20 passages with their fields, and their 10 nearest neighbors, searched exactly by the engine, are compared with
    the store.

    Args:
        store: the store.
        engine: "parquet", "qdrant", "lancedb", "milvus", "pgvector" or "usearch".
        where: folder, address or connection string.
        name: name of the collection or table. Default: "passages".
        batch: rows written at once. Default: 1000.
        progress: called with the number of rows written, or found there at the start.

    Returns:
        Number of rows there.

    Raises:
        InputError: the engine's client is not installed, the collection holds something else, or the engine returns
            other neighbors.
    """
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r:.60}")
    store.check()
    if not store.rows:
        raise InputError(f"{store.folder}: expected passages to export, found none")
    target = ENGINES[engine](where, name, store.dim)
    with target.one_line():
        try:
            _write(store, target, batch, progress)
            target.finish()
            _verify(store, target)
        finally:
            target.close()
    return store.rows


def _write(store: EmbeddingStore, target: Engine, batch: int, progress: Callable[[int], None] | None) -> None:
    done = target.rows()
    first_id = [passage.id for passage in target.passages([0])]
    if done > store.rows or first_id != ([store.ids()[0]] if done else []):
        raise InputError(
            f"{target.where}: {target.name}: expected an empty collection or the first rows of {store.folder}, found "
            f"{done} rows of others; choose another name"
        )
    if progress is not None:
        progress(done)
    passages = islice(store.passages(), done, None)
    for first, vectors in store.shards():
        for start in range(max(0, done - first), len(vectors), batch):
            part = np.asarray(vectors[start : start + batch], np.float32)
            target.put(first + start, list(islice(passages, len(part))), part)
            if progress is not None:
                progress(len(part))


def _verify(store: EmbeddingStore, target: Engine) -> None:
    if (found := target.rows()) != store.rows:
        raise InputError(f"{target.where}: {target.name}: expected {store.rows} rows, found {found}")
    from index.ann.train import read_rows

    rows = np.unique(np.linspace(0, store.rows - 1, SAMPLE).astype(np.int64))
    _verify_passages(store, target, rows.tolist())
    queries, k = read_rows(store, rows), min(K, store.rows)
    scores, _ = search(queries, store.shards(), RowNumberIds(store.rows), k)
    for number, (lowest, neighbors) in enumerate(zip(scores[:, -1], target.search(queries, k), strict=True)):
        # Rows of equal scores may come in any order: a neighbor is right if its score is high enough.
        products = read_rows(store, np.unique(np.array(neighbors, np.int64))) @ queries[number]
        if len(products) != k or products.min() < lowest - TOLERANCE * max(1, abs(lowest)):
            raise InputError(
                f"{target.where}: {target.name}: expected the {k} nearest rows of row {rows[number]}, found others: "
                "was another store exported there?"
            )


def _verify_passages(store: EmbeddingStore, target: Engine, rows: list[int]) -> None:
    wanted = set(rows)
    expected = {row: target.stored(each) for row, each in enumerate(store.passages()) if row in wanted}
    found = dict(zip(rows, target.passages(rows), strict=False))
    for row in rows:
        if (other := found.get(row)) != expected[row]:
            raise InputError(
                f"{target.where}: {target.name}: expected passage {expected[row].id!r:.60} in row {row}, found "
                f"{'none' if other is None else f'another ({other.id!r:.60})'}"
            )
