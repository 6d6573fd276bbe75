"""Evaluate a model on a BEIR split: embed the queries, search the embedded corpus exactly, compute the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.long_documents import WINDOWS, best_of_windows, documents_of
from eval.metrics import KS, Metrics, evaluate_run
from eval.ranking import RankedRun, identical_id_rows, rows_of
from index.beir import BeirDataset
from index.files import InputError

if TYPE_CHECKING:
    from index.store.reader import EmbeddingStore

Embed = Callable[[Sequence[str]], np.ndarray]
"""Embed M texts as a float array [M, D]."""

Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries float32 [M, D], k) -> scores float32 [M, K] and rows int64 [M, K], padded with row -1."""

Products = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""P pairs of query rows [P] and passage rows [P] -> exact inner products [P] and bounds of their float32 error [P]."""

# Bytes of passage embeddings per block of products.
PRODUCTS_BYTES = 2**26


def evaluate_beir(
    dataset: BeirDataset,
    *,
    store: EmbeddingStore,
    embed_queries: Embed,
    k: int = 1000,
    ks: Sequence[int] = KS,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    on_ranks: bool = False,
    keep_identical_ids: bool = False,
) -> tuple[RankedRun, Metrics]:
    """Search the corpus exactly by inner product with every query of a split, and compute the metrics.

    Args:
        dataset: the split.
        store: the embedded corpus of N passages [N, D], or the windows of long documents (eval.long_documents).
        embed_queries: embeds query texts in the same space, normalized if the model normalizes.
        k: passages per query, at least 1.
        ks: cut-offs of the measures; those above `k` are omitted.
        device: where the products are computed, "cpu" or "cuda".
        progress: called with the number of corpus rows searched since the last call.
        on_ranks: see `exact_search`.
        keep_identical_ids: see `ranked_run`.

    Returns:
        The run, with at most `k` passages per query, and its metrics.

    Raises:
        InputError: the store is damaged, the qrels judge a passage that it lacks, or the query embeddings contain NaN
            or have another dimension.
        ValueError: `k` is below 1, or every cut-off is above `k`.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    store.check()
    ids = store.ids()
    find = exact_search(store, ids, device=device, progress=progress, on_ranks=on_ranks)
    run = ranked_run(
        dataset,
        ids,
        find,
        lambda: query_vectors(dataset, embed_queries, store.dim),
        k,
        is_windows(store),
        keep_identical_ids=keep_identical_ids,
    )
    return run, score(dataset, run, k, ks, keep_identical_ids=keep_identical_ids)


def is_windows(store: EmbeddingStore) -> bool:
    """Whether the rows of the store are windows of long documents."""
    return WINDOWS in store.source


def score(
    dataset: BeirDataset, run: RankedRun, k: int, ks: Sequence[int] = KS, *, keep_identical_ids: bool = False
) -> Metrics:
    """Compute the metrics of a run of depth `k`, at the cut-offs up to `k`."""
    cuts = [cut for cut in ks if cut <= k]
    return evaluate_run(dataset.qrels, run, cuts, drop_identical=not keep_identical_ids)


def query_vectors(dataset: BeirDataset, embed_queries: Embed, dim: int) -> np.ndarray:
    """Embed the queries of the split as float32 [M, D].

    Raises:
        InputError: the embeddings have another shape.
    """
    queries = np.asarray(embed_queries(list(dataset.queries.values())), dtype=np.float32)
    if queries.shape != (len(dataset.queries), dim):
        raise InputError(
            f"{dataset.name}: expected query vectors {[len(dataset.queries), dim]} to go with the corpus's, "
            f"found {list(queries.shape)}"
        )
    return queries


def exact_search(
    store: EmbeddingStore,
    ids: Sequence[str],
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    block_rows: int | None = None,
    on_ranks: bool = False,
) -> Find:
    """Make an exact search function over a store.

    Args:
        store: the embedded corpus.
        ids: the ids of its rows, which order ties.
        device: where the products are computed, "cpu" or "cuda".
        progress: called with the number of rows searched since the last call.
        block_rows: rows per block; by default chosen by the search. The result does not depend on it.
        on_ranks: share the work among all ranks of torch.distributed, which must call with the same arguments. Every
            rank gets the result of a single process, bitwise.
    """
    from index.exact import search as exact

    search = exact.search_on_ranks if on_ranks else exact.search

    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search(queries, store.shards(), ids, k, block_rows=block_rows, device=device, progress=progress)

    return find


def exact_products(store: EmbeddingStore, queries: np.ndarray) -> Products:
    """Make a function that computes exact inner products of (query, passage) pairs.

    Passages are numbered as in `ranked_run`. If the store holds windows, a passage is a document, and its product is
    the maximum over its windows.

    Args:
        store: the embedded corpus.
        queries: float32 [Q, D].
    """
    from index.ann.train import read_rows
    from index.ann.tuning import recall

    starts = None
    if is_windows(store):
        document_of_row = documents_of(store.ids())[1]
        starts = np.searchsorted(document_of_row, np.arange(document_of_row.max(initial=-1) + 2))

    def of_rows(query_rows: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products, errors = np.empty(len(rows)), np.empty(len(rows))
        step = max(1, PRODUCTS_BYTES // (8 * store.dim))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            unique, inverse = np.unique(rows[block], return_inverse=True)
            pairs = queries[query_rows[block]], read_rows(store, unique)[inverse]
            products[block], errors[block] = recall.exact_products(*pairs)
        return products, errors

    def of_documents(query_rows: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert starts is not None
        counts = starts[rows + 1] - starts[rows]
        firsts = counts.cumsum() - counts
        windows = np.arange(counts.sum()) + np.repeat(starts[rows] - firsts, counts)
        products, errors = of_rows(np.repeat(query_rows, counts), windows)
        return np.maximum.reduceat(products, firsts), np.maximum.reduceat(errors, firsts)

    return of_rows if starts is None else of_documents


def ranked_run(
    dataset: BeirDataset,
    ids: Sequence[str],
    find: Find,
    vectors: Callable[[], np.ndarray],
    k: int,
    windows: bool = False,
    *,
    keep_identical_ids: bool = False,
) -> RankedRun:
    """Retrieve `k` passages for each query of the split (or all, if the corpus is smaller).

    As in BEIR, a passage with the id of its query is removed, but only if the qrels do not judge the pair. The query
    still gets `k` other passages.

    Args:
        dataset: the split.
        ids: passage ids of the rows that `find` returns.
        find: exact or approximate search over the rows of `ids`.
        vectors: returns the query embeddings [M, D]; called after the qrels have been checked against `ids`.
        k: passages per query.
        windows: the rows are windows of documents; a document gets the score of its best window (MaxP).
        keep_identical_ids: do not remove any passage.

    Raises:
        InputError: the qrels judge a passage that `ids` lacks.
    """
    if windows:
        ids, document_of_row = documents_of(ids)
        find = best_of_windows(find, document_of_row)
    wanted = dataset.judged | dataset.qrels.keys()
    row_of = rows_of(ids, wanted)
    dataset.check(row_of)
    identical = identical_id_rows(dataset.queries, {} if keep_identical_ids else row_of, dataset.qrels)
    # One more, so that k passages remain after the removal of an identical id.
    scores, rows = find(vectors(), k + 1 if (identical >= 0).any() else k)
    run = RankedRun(list(dataset.queries), ids, rows, scores)
    run.cache_rows(wanted, row_of)
    return run.without(identical, k)
