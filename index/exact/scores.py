"""The score of a query and a passage: their exact inner product, rounded to float64 and then to float32.

It depends on the two vectors only, not on block size, device or order of summation. Nearly always a float64 sum in any
order is accurate enough to determine the float32 score; the remaining pairs are summed without rounding errors.
"""

from __future__ import annotations

import math
import warnings

import torch

# Float64 numbers processed at once: as many as fit into the cache (some 50 MiB on a large GPU).
FLOAT64_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}
ROUND64 = 2.0**-53


def pair_scores(
    queries: torch.Tensor,
    passages: torch.Tensor,
    query_of: torch.Tensor,
    passage_of: torch.Tensor,
    errors: torch.Tensor,
) -> torch.Tensor:
    """Scores [P] float32 of the pairs (query_of[i], passage_of[i]).

    Args:
        queries: [Q, D] float32, finite.
        passages: [N, D] floating, finite.
        query_of: [P] int64, rows of `queries`.
        passage_of: [P] int64, rows of `passages`.
        errors: [Q] float64, from `sum_errors`.
    """
    exact_queries = queries.double()
    sums_of = _gathered_sums if queries.is_cuda else _sampled_sums
    scores, unsure = _round_to_float32(sums_of(exact_queries, passages, query_of, passage_of), errors[query_of])
    for positions in unsure.nonzero().flatten().split(_rows_at_once(queries)):
        scores[positions] = _exact_sums(exact_queries[query_of[positions]] * passages[passage_of[positions]])
    return scores


def _gathered_sums(
    queries: torch.Tensor, passages: torch.Tensor, query_of: torch.Tensor, passage_of: torch.Tensor
) -> torch.Tensor:
    """Inner products [P] float64 of pairs, by gathering both vectors of each pair; fast on a GPU."""
    sums = torch.empty(len(query_of), dtype=torch.float64, device=queries.device)
    step = min(len(query_of), _rows_at_once(queries))
    # Buffers are reused: allocating them again takes as long as the products.
    products = queries.new_empty((step, queries.shape[1]))
    gathered = passages.new_empty((step, queries.shape[1]))
    for start in range(0, len(query_of), max(1, step)):
        some = slice(start, min(start + step, len(query_of)))
        count = some.stop - start
        torch.index_select(queries, 0, query_of[some], out=products[:count])
        torch.index_select(passages, 0, passage_of[some], out=gathered[:count])
        torch.sum(products[:count].mul_(gathered[:count]), dim=1, out=sums[some])
    return sums


def _sampled_sums(
    queries: torch.Tensor, passages: torch.Tensor, query_of: torch.Tensor, passage_of: torch.Tensor
) -> torch.Tensor:
    """Inner products [P] float64 of pairs, as a sampled matrix product (some entries of Q P^T); fast on a CPU.

    Each passage is read once while the queries stay in the cache: 3 to 8 times faster than gathering both vectors.
    """
    sums = torch.zeros(len(query_of), dtype=torch.float64)
    if not queries.shape[1] or not len(query_of):
        return sums
    # Keys with the position in their low half sort twice as fast as an argsort.
    keys = (passage_of << 32) + torch.arange(len(query_of))
    keys.numpy().sort()
    order, columns = keys & 0xFFFFFFFF, queries.T
    rows, counts = torch.unique_consecutive(keys >> 32, return_counts=True)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    step = _rows_at_once(queries)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        bounds = ends[first : first + len(some) + 1]
        positions = order[bounds[0] : bounds[-1]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            wanted = torch.sparse_csr_tensor(
                bounds - bounds[0],
                query_of[positions],
                sums.new_zeros(len(positions)),
                (len(some), len(queries)),
                check_invariants=False,
            )
            found = torch.sparse.sampled_addmm(wanted, passages[some].double(), columns, beta=0.0)
        sums[positions] = found.values()
    return sums


def block_scores(queries: torch.Tensor, passages: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Scores [Q, n] float32 of all pairs, equal to `pair_scores`, at the cost of a float64 matrix product."""
    right = passages.double()
    scores, unsure = _round_to_float32(queries.double() @ right.T, errors[:, None])
    query_of, passage_of = unsure.nonzero(as_tuple=True)
    step = _rows_at_once(queries)
    for some, others in zip(query_of.split(step), passage_of.split(step), strict=True):
        scores[some, others] = _exact_sums(queries[some].double() * right[others])
    return scores


def sum_errors(norms: torch.Tensor, largest_norm: float, dimension: int) -> torch.Tensor:
    """Bound on the rounding error of a float64 sum in any order: float64, shaped like `norms`.

    Products of two float32 numbers are exact in float64, so only the D additions round (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1). The factor 2 covers the rounding of the norms.

    Args:
        norms: float64, Euclidean norms of the queries.
        largest_norm: the largest norm of any passage.
        dimension: D.
    """
    return 2 * (dimension + 2) * ROUND64 * largest_norm * norms


def _rows_at_once(queries: torch.Tensor) -> int:
    return max(1, FLOAT64_AT_ONCE[queries.device.type] // max(1, queries.shape[1]))


def _round_to_float32(sums: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sums rounded to float32, and a mask of those that could round differently within `errors`."""
    low = (sums - errors).float()
    # Adding 0 turns -0.0 into 0.0, which has other bits.
    return low + 0.0, low != (sums + errors).float()


def _exact_sums(products: torch.Tensor) -> torch.Tensor:
    """Exact sums of float64 `products` [P, D], rounded to float32 [P].

    Pairwise summation that also sums the rounding error of every addition (Knuth's TwoSum). This decides nearly all
    sums; the others are computed one by one with math.fsum.
    """
    width = products.shape[1]
    addends = products
    lost, size = products.new_zeros(len(products)), products.new_zeros(len(products))
    while addends.shape[1] > 1:
        pairs = addends.shape[1] // 2
        left, right = addends[:, :pairs], addends[:, -pairs:]
        total = left + right
        share = total - left
        error = (left - (total - share)) + (right - share)
        lost += error.sum(dim=1)
        size += error.abs().sum(dim=1)
        addends = torch.cat([total, addends[:, pairs : addends.shape[1] - pairs]], dim=1)
    sums = addends.sum(dim=1) + lost
    doubt = torch.where(size > 0, 4 * ROUND64 * sums.abs() + 4 * width * ROUND64 * size, 0.0)
    scores, unsure = _round_to_float32(sums, doubt)
    positions = unsure.nonzero().flatten()
    if len(positions):
        exact = [math.fsum(row) for row in products[positions].tolist()]
        scores[positions] = torch.tensor(exact, dtype=torch.float64).to(scores) + 0.0
    return scores
