"""Score a model on a BEIR split: embed the queries, search the embedded corpus exactly, evaluate with trec_eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.beir import BeirDataset
from eval.metrics import KS, Metrics, evaluate_run
from eval.ranking import RankedRun, rows_of
from index.files import InputError

if TYPE_CHECKING:
    from index.embeddings import EmbeddingStore


def evaluate_beir(
    dataset: BeirDataset,
    *,
    store: EmbeddingStore,
    embed_queries: Callable[[Sequence[str]], np.ndarray],
    k: int = 1000,
    ks: Sequence[int] = KS,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[RankedRun, Metrics]:
    """Search `store` with every query of the split, by inner product in fp32, and score the ranking.

    A passage whose id is its query's own id is not returned, and every query still gets `k` passages (or the corpus).

    Args:
        dataset: the split; it may have a single query.
        store: the embedded corpus, N passages of D dimensions.
        embed_queries: texts of M queries -> float array [M, D], in the same space and, where the model normalises,
            of unit length.
        k: passages a query, at least 1.
        ks: cut-offs; those above `k` are left out, since the run is not that deep.
        device: where the products are computed ("cpu", "cuda").
        progress: called with the rows of the corpus searched since the last call.

    Returns:
        The run, each query's passages best first, and its metrics.

    Raises:
        InputError: the qrels judge a passage that the store lacks, or the vectors hold NaN or have another dimension.
        ValueError: `k` is below 1, or no cut-off is within it.
    """
    from index.exact import search

    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    ids = store.ids()
    row_of = rows_of(ids, dataset.judged | dataset.queries.keys())
    dataset.check(row_of)
    queries = np.asarray(embed_queries(list(dataset.queries.values())), dtype=np.float32)
    if queries.shape != (len(dataset.queries), store.dim):
        raise InputError(
            f"{dataset.name}: expected query vectors {[len(dataset.queries), store.dim]} to go with the corpus's, "
            f"found {list(queries.shape)}"
        )
    own = np.array([row_of.get(query, -1) for query in dataset.queries], dtype=np.int64)
    # One more, so that dropping a query's own passage still leaves k.
    depth = k + 1 if (own >= 0).any() else k
    scores, rows = search(queries, store.shards(), ids, depth, device=device, progress=progress)
    run = RankedRun(list(dataset.queries), ids, rows, scores).without(own, k)
    return run, evaluate_run(dataset.qrels, run, [cut for cut in ks if cut <= k])
