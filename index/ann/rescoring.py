"""Search of binary codes with re-scoring: the nearest by Hamming distance, ranked by finer vectors."""

from __future__ import annotations

import numpy as np

from index.ann.factory import import_faiss
from index.store.reader import EmbeddingStore
from index.store.shards import quantized
from index.ties import order_ties


def search_rescored(
    queries: np.ndarray, codes: np.ndarray, fine: EmbeddingStore, k: int, *, factor: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `factor` · k codes nearest to each query's code, and rank them by their inner product in `fine`.

    The codes are what is in memory; of `fine` only the candidates' vectors are read. So Yamada et al. (BPR,
    arXiv 2106.00882) search, and sentence-transformers' `semantic_search_faiss` with `rescore`.

    Args:
        queries: [Q, D] float32.
        codes: binary codes of N passages, uint8 [N, ceil(D / 8)].
        fine: the store of their vectors, in any precision.
        k: results per query.
        factor: candidates per result. Default: 4.

    Returns:
        scores [Q, min(k, N)] float32, descending, and rows [Q, min(k, N)] int64; equal scores as in index/ties.py.
    """
    from index.ann.train import read_rows

    faiss = import_faiss()
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(np.ascontiguousarray(codes))
    _, candidates = index.search(quantized(queries, "binary"), min(len(codes), factor * k))
    wanted, position = np.unique(candidates, return_inverse=True)
    vectors, position = read_rows(fine, wanted), position.reshape(candidates.shape)
    scores = np.empty(candidates.shape, np.float32)
    for query, rows in enumerate(position):
        scores[query] = vectors[rows] @ queries[query]
    order = np.argsort(-scores, axis=1)
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
    order_ties(scores, rows, fine.ids())
    return scores[:, :k], rows[:, :k]
