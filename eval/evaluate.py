"""Score a model on a BEIR split: embed the queries, search the embedded corpus, evaluate as trec_eval does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.long_documents import WINDOWS, best_of_windows, documents_of
from eval.metrics import KS, Metrics, evaluate_run
from eval.ranking import RankedRun, own_rows, rows_of
from index.beir import BeirDataset
from index.files import InputError

if TYPE_CHECKING:
    from index.store.reader import EmbeddingStore

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts of M queries -> float array [M, D]."""

Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries [M, D] float32, k) -> scores [M, K] float32 and rows [M, K] int64, -1 for a place that stays empty."""

Products = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Pairs of (places of queries, rows of passages), [P] each -> exact inner products and how float32 may round them."""

# Bytes of vectors whose products are made at once.
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
    """Search `store` with every query of the split, by inner product in fp32, and score the ranking.

    Args:
        dataset: the split; it may have a single query.
        store: the embedded corpus, N passages of D dimensions, or their windows (eval.long_documents).
        embed_queries: in the same space and, where the model normalises, of unit length.
        k: passages a query, at least 1.
        ks: cut-offs; those above `k` are left out, since the run is not that deep.
        device: where the products are computed ("cpu", "cuda").
        progress: called with the rows of the corpus searched since the last call.
        on_ranks: as in `exact_search`.
        keep_identical_ids: as in `ranked_run`.

    Returns:
        The run, each query's passages best first, and its metrics.

    Raises:
        InputError: the store is damaged, the qrels judge a passage that it lacks, or the vectors hold NaN or have
            another dimension.
        ValueError: `k` is below 1, or no cut-off is within it.
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
    """Whether the rows of the store are windows of documents."""
    return WINDOWS in store.source


def score(
    dataset: BeirDataset, run: RankedRun, k: int, ks: Sequence[int] = KS, *, keep_identical_ids: bool = False
) -> Metrics:
    """The metrics of a run of depth `k` at those cut-offs that are within it."""
    cuts = [cut for cut in ks if cut <= k]
    return evaluate_run(dataset.qrels, run, cuts, drop_identical=not keep_identical_ids)


def query_vectors(dataset: BeirDataset, embed_queries: Embed, dim: int) -> np.ndarray:
    """The split's queries as float32 [M, D].

    Raises:
        InputError: they have another dimension than the corpus.
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
    """Exact search of a store.

    Args:
        on_ranks: all ranks of torch.distributed search together, called with the same arguments; each gets the result
            that one process alone would get, bit by bit.
    """
    from index.exact import search as exact

    search = exact.search_on_ranks if on_ranks else exact.search

    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search(queries, store.shards(), ids, k, block_rows=block_rows, device=device, progress=progress)

    return find


def exact_products(store: EmbeddingStore, queries: np.ndarray) -> Products:
    """The products of single pairs of `queries` [Q, D] and passages: rows of the store, or documents of its windows.

    Rows number the passages as `ranked_run` does; a document's product is that of its best window.
    """
    from index.ann.train import read_rows
    from index.ann.tuning import recall

    starts = None
    if is_windows(store):
        document_of_row = documents_of(store.ids())[1]
        starts = np.searchsorted(document_of_row, np.arange(document_of_row.max(initial=-1) + 2))

    def of_rows(places: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products, errors = np.empty(len(rows)), np.empty(len(rows))
        step = max(1, PRODUCTS_BYTES // (8 * store.dim))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            unique, inverse = np.unique(rows[some], return_inverse=True)
            pairs = queries[places[some]], read_rows(store, unique)[inverse]
            products[some], errors[some] = recall.exact_products(*pairs)
        return products, errors

    def of_documents(places: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert starts is not None
        counts = starts[rows + 1] - starts[rows]
        firsts = counts.cumsum() - counts
        windows = np.arange(counts.sum()) + np.repeat(starts[rows] - firsts, counts)
        products, errors = of_rows(np.repeat(places, counts), windows)
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
    """Rank the passages `ids` for the split's queries, `k` each (or the corpus).

    A passage that has its query's id is left out, unless the qrels judge the pair; the query still gets `k` others.

    Args:
        find: exact or approximate search over the rows of `ids`.
        vectors: gives the queries [M, D]; asked after the qrels have been checked against `ids`.
        windows: the rows are windows: a document scores as its best one does.
        keep_identical_ids: leave no passage out.

    Raises:
        InputError: the qrels judge a passage that `ids` lacks.
    """
    if windows:
        ids, document_of_row = documents_of(ids)
        find = best_of_windows(find, document_of_row)
    sought = dataset.judged | dataset.qrels.keys()
    row_of = rows_of(ids, sought)
    dataset.check(row_of)
    own = own_rows(dataset.queries, {} if keep_identical_ids else row_of, dataset.qrels)
    # One more, so that leaving out a query's own passage still leaves k.
    scores, rows = find(vectors(), k + 1 if (own >= 0).any() else k)
    run = RankedRun(list(dataset.queries), ids, rows, scores)
    run.remember(sought, row_of)
    return run.without(own, k)
