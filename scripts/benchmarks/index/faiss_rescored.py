"""Exact search by faiss's brute force and re-scoring, which bench_exact.py compares with `index.exact.search`.

faiss finds the best candidates by float32 products; their exact scores are then computed as in `index.exact`. The
result is certain once the k-th exact score exceeds every score that a passage beyond the candidates can have. Queries
for which it does not are searched again for twice as many candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from index.exact.products import ROUND32
from index.exact.scores import pair_scores, sum_errors
from index.exact.top_k import rank_entries, to_arrays

# Candidates beyond k.
SPARE = 16

FindBest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def search(
    queries: np.ndarray, passages: np.ndarray, ids: Sequence[str], k: int, find: FindBest
) -> tuple[np.ndarray, np.ndarray]:
    """The result of `index.exact.search`, bit for bit.

    Args:
        queries: [Q, D] float32.
        passages: [N, D] float32.
        ids: the ids of the passages.
        k: results per query.
        find: queries and a number of candidates to their float32 products and rows, best first.
    """
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    largest = float(np.sqrt(np.einsum("nd,nd->n", passages, passages, dtype=np.float64).max()))
    dim = queries.shape[1]
    # As in `index.exact.products`: the rounding of a float32 sum in any order, and of the score.
    bounds = (1.01 * dim + 4) * ROUND32 * norms * largest
    errors = sum_errors(torch.from_numpy(norms), largest, dim)
    asked, there = torch.from_numpy(queries), torch.from_numpy(passages)
    scores = np.empty((len(queries), min(k, len(passages))), np.float32)
    rows = np.empty(scores.shape, np.int64)
    left, count = np.arange(len(queries)), k + SPARE
    while len(left):
        count = min(count, len(passages))
        products, found = find(queries[left], count)
        query = torch.arange(len(left)).repeat_interleave(count)
        row = torch.from_numpy(found.ravel())
        score = pair_scores(asked[left], there, query, row, errors[left])
        best, best_rows = to_arrays(*rank_entries(query, score, row, k, ids), len(left))
        certain = (best[:, -1] > products[:, -1] + bounds[left]) | (count == len(passages))
        scores[left[certain]], rows[left[certain]] = best[certain], best_rows[certain]
        left, count = left[~certain], 2 * count
    return scores, rows
