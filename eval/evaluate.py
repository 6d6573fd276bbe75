"""Score a model on a BEIR split: embed the queries, search the embedded corpus, evaluate as trec_eval does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.long_documents import WINDOWS, best_of_windows, documents_of
from eval.metrics import KS, Metrics, evaluate_run
from eval.ranking import RankedRun, rows_of
from index.beir import BeirDataset
from index.files import InputError

if TYPE_CHECKING:
    from index.embeddings import EmbeddingStore

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts of M queries -> float array [M, D]."""

Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries [M, D] float32, k) -> scores [M, K] float32 and rows [M, K] int64, -1 for a place that stays empty."""


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
) -> tuple[RankedRun, Metrics]:
    """Search `store` with every query of the split, by inner product in fp32, and score the ranking.

    A passage whose id is its query's own id is not returned, and every query still gets `k` passages (or the corpus).
    Args:
        dataset: the split; it may have a single query.
        store: the embedded corpus, N passages of D dimensions, or their windows (eval.long_documents).
        embed_queries: in the same space and, where the model normalises, of unit length.
        k: passages a query, at least 1.
        ks: cut-offs; those above `k` are left out, since the run is not that deep.
        device: where the products are computed ("cpu", "cuda").
        progress: called with the rows of the corpus searched since the last call.
        on_ranks: as in `exact_search`.

    Returns:
        The run, each query's passages best first, and its metrics.

    Raises:
        InputError: the qrels judge a passage that the store lacks, or the vectors hold NaN or have another dimension.
        ValueError: `k` is below 1, or no cut-off is within it.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    ids = store.ids()
    find = exact_search(store, ids, device=device, progress=progress, on_ranks=on_ranks)
    run = ranked_run(dataset, ids, find, lambda: query_vectors(dataset, embed_queries, store.dim), k, is_windows(store))
    return run, score(dataset, run, k, ks)


def is_windows(store: EmbeddingStore) -> bool:
    """Whether the rows of the store are windows of documents."""
    return WINDOWS in store.source


def score(dataset: BeirDataset, run: RankedRun, k: int, ks: Sequence[int] = KS) -> Metrics:
    """The metrics of a run of depth `k` at those cut-offs that are within it."""
    return evaluate_run(dataset.qrels, run, [cut for cut in ks if cut <= k])


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
    from index import exact

    search = exact.search_on_ranks if on_ranks else exact.search

    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search(queries, store.shards(), ids, k, block_rows=block_rows, device=device, progress=progress)

    return find


def ranked_run(
    dataset: BeirDataset,
    ids: Sequence[str],
    find: Find,
    vectors: Callable[[], np.ndarray],
    k: int,
    windows: bool = False,
) -> RankedRun:
    """Rank the passages `ids` for the split's queries, `k` each, without passages that are their own query.

    Args:
        find: exact or approximate search over the rows of `ids`.
        vectors: gives the queries [M, D]; asked after the qrels have been checked against `ids`.
        windows: the rows are windows: a document scores as its best one does.

    Raises:
        InputError: the qrels judge a passage that `ids` lacks.
    """
    if windows:
        ids, document_of_row = documents_of(ids)
        find = best_of_windows(find, document_of_row)
    sought = dataset.judged | dataset.qrels.keys()
    row_of = rows_of(ids, sought)
    dataset.check(row_of)
    own = np.array([row_of.get(query, -1) for query in dataset.queries], dtype=np.int64)
    # One more, so that dropping a query's own passage still leaves k.
    scores, rows = find(vectors(), k + 1 if (own >= 0).any() else k)
    run = RankedRun(list(dataset.queries), ids, rows, scores)
    run.remember(sought, row_of)
    return run.without(own, k)
