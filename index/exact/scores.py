"""The score of a pair: the exact inner product of its float32 vectors, rounded to float64 and then to float32.

It belongs to the pair alone: no block size, device, or order of summation can change a bit of it. Nearly always any
sum in float64 is close enough to tell the float32 number; the pairs where it is not are summed without error.
"""

from __future__ import annotations

import math
import warnings

import torch

# Numbers in float64 that are held at once: as many as stay in the cache, of which a large GPU has some 50 MiB.
AT_ONCE = {"cpu": 2**18, "cuda": 2**22}
ROUND64 = 2.0**-53


def pair_scores(
    queries: torch.Tensor,
    passages: torch.Tensor,
    query_of: torch.Tensor,
    passage_of: torch.Tensor,
    errors: torch.Tensor,
) -> torch.Tensor:
    """Scores [P] float32 of the pairs (query_of[i], passage_of[i]), both int64 [P].

    Args:
        queries: float32 [Q, D], finite.
        passages: floating [N, D], finite.
        errors: float64 [Q], from `sum_errors`.
    """
    exact_queries = queries.double()
    sum_of = _gathered_sums if queries.is_cuda else _sampled_sums
    scores, unsure = _rounded(sum_of(exact_queries, passages, query_of, passage_of), errors[query_of])
    for places in unsure.nonzero().flatten().split(_rows_at_once(queries)):
        scores[places] = _exact_sums(exact_queries[query_of[places]] * passages[passage_of[places]])
    return scores


def _gathered_sums(
    queries: torch.Tensor, passages: torch.Tensor, query_of: torch.Tensor, passage_of: torch.Tensor
) -> torch.Tensor:
    """Inner products [P] float64 of pairs, their vectors side by side: what a GPU is quick at."""
    sums = torch.empty(len(query_of), dtype=torch.float64, device=queries.device)
    step = min(len(query_of), _rows_at_once(queries))
    # Filled again and again: memory asked for anew costs as much time as the products.
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
    """The same on a processor: passage by passage, so that each is read once and the queries stay in its cache.

    A product of two matrices of which only some entries are wanted; 3 to 8 times as fast as to gather both sides.
    """
    sums = torch.zeros(len(query_of), dtype=torch.float64)
    if not queries.shape[1] or not len(query_of):
        return sums
    # Sorted with their places in the low half: twice as fast as a sort that returns places.
    keys = (passage_of << 32) + torch.arange(len(query_of))
    keys.numpy().sort()
    order, columns = keys & 0xFFFFFFFF, queries.T
    rows, counts = torch.unique_consecutive(keys >> 32, return_counts=True)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    step = _rows_at_once(queries)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        bounds = ends[first : first + len(some) + 1]
        places = order[bounds[0] : bounds[-1]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            wanted = torch.sparse_csr_tensor(
                bounds - bounds[0],
                query_of[places],
                sums.new_zeros(len(places)),
                (len(some), len(queries)),
                check_invariants=False,
            )
            found = torch.sparse.sampled_addmm(wanted, passages[some].double(), columns, beta=0.0)
        sums[places] = found.values()
    return sums


def block_scores(queries: torch.Tensor, passages: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Scores [Q, n] float32 of every pair: `pair_scores` at the cost of a product in float64."""
    right = passages.double()
    scores, unsure = _rounded(queries.double() @ right.T, errors[:, None])
    query_of, passage_of = unsure.nonzero(as_tuple=True)
    step = _rows_at_once(queries)
    for some, others in zip(query_of.split(step), passage_of.split(step), strict=True):
        scores[some, others] = _exact_sums(queries[some].double() * right[others])
    return scores


def sum_errors(norms: torch.Tensor, largest_norm: float, dimension: int) -> torch.Tensor:
    """How far a float64 sum may lie from the exact one, whatever its order: float64 like `norms`.

    A product of two float32 numbers is exact in float64, so only D sums round (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1); twice that leaves room for the rounding of the norms.

    Args:
        norms: float64, Euclidean norms of the queries.
        largest_norm: of any passage.
    """
    return 2 * (dimension + 2) * ROUND64 * largest_norm * norms


def _rows_at_once(queries: torch.Tensor) -> int:
    return max(1, AT_ONCE[queries.device.type] // max(1, queries.shape[1]))


def _rounded(sums: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sums as float32, and where numbers within `errors` of the sum would round differently."""
    low = (sums - errors).float()
    # Adding 0 makes -0.0, which has another bit pattern, 0.0.
    return low + 0.0, low != (sums + errors).float()


def _exact_sums(products: torch.Tensor) -> torch.Tensor:
    """Sums [P] float32 of exact float64 `products` [P, D], as if summed without any rounding.

    Halves are added and the rounding error of every addition is kept (Knuth's TwoSum). Where no addition rounded, as
    with whole numbers, or where the sum of the errors decides, that is the answer; the few sums left go one by one.
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
    scores, unsure = _rounded(sums, doubt)
    places = unsure.nonzero().flatten()
    if len(places):
        exact = [math.fsum(row) for row in products[places].tolist()]
        scores[places] = torch.tensor(exact, dtype=torch.float64).to(scores) + 0.0
    return scores
