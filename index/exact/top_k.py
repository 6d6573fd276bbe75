"""The top k of each query: sorting and cutting lists, merging them, and keeping the best while blocks are searched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from index.exact.products import Approximation, Block, Queries
from index.exact.scores import block_scores, pair_scores
from index.exact.windows import Window
from index.ties import best_first, id_ranks

# Unscored candidates kept for a group of queries, beyond 8k per query: 24 bytes each.
CANDIDATES = 2**22


class TopK:
    """The top k passages so far for a group of queries.

    From every block, passages whose upper score bound reaches the threshold of a query are kept as candidates.
    `rescore` computes exact scores of the remaining candidates while their vectors are still in the window.
    """

    def __init__(self, queries: Queries, k: int, ids: Sequence[str]) -> None:
        self.count = len(queries.vectors)
        self._queries = queries
        self._k = k
        self._ids = ids
        device = queries.vectors.device
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        # Results, sorted (parallel tensors): query, score, row.
        self.query, self.score, self.row = nothing, nothing.float(), nothing
        # Candidates (parallel tensors): query, lower and upper score bound, position in the window.
        self._none = (nothing, nothing.float(), nothing.float(), nothing)
        self._candidates = self._none
        self._added: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # Number of candidates now, and after the last `_prune`.
        self._candidate_count = self._count_after_prune = 0
        # [Q, 1]: a passage that scores below it cannot be in the top k of the query.
        self._threshold = queries.vectors.new_full((self.count, 1), -torch.inf)
        self._all_bounded = False

    def _unbounded(self) -> bool:
        """Whether some query has no threshold yet. Cached once false, to avoid waiting for the GPU."""
        self._all_bounded = self._all_bounded or not bool(self._threshold.isinf().any())
        return not self._all_bounded

    def update(self, block: Block, window: Window) -> None:
        """Add the candidates of a block of `window`."""
        if len(block.vectors) >= self._k and self._unbounded():
            # The k-th product of the whole block gives a higher threshold than that of a slice, and fewer candidates.
            at_once = -(-self.count // len(block.slices()))
            for which in torch.arange(self.count, device=self._threshold.device).split(at_once):
                self._update(block, which if at_once < self.count else None, window)
        else:
            for part in block.slices():
                self._update(part, None, window)
        if self._candidate_count > self._count_after_prune + self.count * self._k:
            self._prune()
            if self._candidate_count > self.count * 8 * self._k + CANDIDATES:
                self.rescore(window)

    def _raise_from_products(self, found: Approximation, which: torch.Tensor | None) -> torch.Tensor:
        """Raise the thresholds of the queries `which` to the lower bound of their k-th product; return them, [M, 1]."""
        kth = found.lower(_kth_lower_bound(found.products, self._k), found.absolute)
        if which is None:
            self._threshold = kth = torch.maximum(self._threshold, kth)
        else:
            self._threshold[which] = kth = torch.maximum(self._threshold[which], kth)
        return kth

    def _update(self, block: Block, which: torch.Tensor | None, window: Window) -> None:
        """Add the candidates of a block for the queries `which` (int64; None: all)."""
        # If the error bound of the products leaves too many candidates for a query, use a higher precision.
        for use_half in (True, False):
            if use_half and (block.half is None or self._queries.half is None):
                continue
            which = self._select(block, which, use_half)
            if which is None:
                return
        assert which is not None
        self._score_all(block, which, window)

    def rescore(self, window: Window) -> None:
        """Compute exact scores of the candidates, whose vectors are in `window`, and merge them into the top k."""
        self._prune()
        query, _, _, position = self._candidates
        errors = self._queries.sum_errors(window.norm)
        score = self._scores(query, position, errors, window)
        query, score = torch.cat([self.query, query]), torch.cat([self.score, score])
        row = torch.cat([self.row, window.rows[position]])
        self.query, self.score, self.row = rank_entries(query, score, row, self._k, self._ids)
        self._candidates = self._none
        self._candidate_count = self._count_after_prune = 0
        self._raise_to_kth(self.query, self.score)

    def _scores(
        self, query: torch.Tensor, position: torch.Tensor, errors: torch.Tensor, window: Window
    ) -> torch.Tensor:
        # Another thread may append parts while these are scored.
        parts = tuple(window.parts)
        if len(parts) == 1:
            return pair_scores(self._queries.vectors, parts[0][1], query, position, errors)
        scores = torch.empty(len(query), device=query.device)
        for begin, vectors in parts:
            here = _nonzero((position >= begin) & (position < begin + len(vectors)))
            scores[here] = pair_scores(self._queries.vectors, vectors, query[here], position[here] - begin, errors)
        return scores

    def _select(self, block: Block, which: torch.Tensor | None, use_half: bool) -> torch.Tensor | None:
        """Add the candidates for the queries `which` (None: all).

        Returns the queries with too many candidates, for which none is added.
        """
        found = self._queries.multiply(block, which, use_half)
        threshold = self._threshold if which is None else self._threshold[which]
        if found.products.shape[1] >= self._k and self._unbounded():
            threshold = self._raise_from_products(found, which)
        query, column, product = _entries_at_least(found.products, found.product_threshold(threshold))
        most = self._k + found.products.shape[1] // 16
        too_many = None
        # `query` is ascending: a query with more than `most` candidates occurs again `most` positions later.
        beyond = query[most:]
        again = beyond == query[: len(beyond)]
        if bool(again.any()):
            crowded = torch.zeros(len(threshold), dtype=torch.bool, device=query.device)
            crowded[beyond[again]] = True
            too_many = crowded.nonzero().flatten()
            keep = ~crowded[query]
            query, column, product = query[keep], column[keep], product[keep]
        self._add(found, query, column + block.start, product, which)
        return too_many if too_many is None or which is None else which[too_many]

    def _add(
        self,
        found: Approximation,
        query: torch.Tensor,
        position: torch.Tensor,
        product: torch.Tensor,
        which: torch.Tensor | None,
    ) -> None:
        error = found.absolute.flatten()[query]
        whole = query if which is None else which[query]
        self._added.append((whole, found.lower(product, error), found.upper(product, error), position))
        self._candidate_count += len(query)

    def _score_all(self, block: Block, which: torch.Tensor, window: Window) -> None:
        """Compute exact scores of the whole block for the queries `which`, and add the top k of each."""
        # Few queries at a time: float64 scores and, with many ties, id ranks take twice the memory of the products.
        errors = self._queries.sum_errors(window.norm)
        for some in which.split(max(1, self.count // 8)):
            scores = block_scores(self._queries.vectors[some], block.full, errors[some])
            best, columns = _block_top_k(scores, min(self._k, scores.shape[1]), block)
            query = some.repeat_interleave(best.shape[1])
            self._added.append((query, best.flatten(), best.flatten(), columns.flatten() + block.start))
            self._candidate_count += len(query)

    def _prune(self) -> None:
        """Raise the thresholds from the candidates' lower bounds, and drop candidates whose upper bound is below."""
        parts = [self._candidates, *self._added]
        self._added = []
        query, lower, upper, position = (torch.cat(part) for part in zip(*parts, strict=True))
        self._raise_to_kth(torch.cat([self.query, query]), torch.cat([self.score, lower]))
        keep = _nonzero(upper >= self._threshold[:, 0][query])
        self._candidates = (query[keep], lower[keep], upper[keep], position[keep])
        self._candidate_count = self._count_after_prune = len(self._candidates[0])

    def _raise_to_kth(self, query: torch.Tensor, value: torch.Tensor) -> None:
        """Raise each query's threshold to the k-th highest of its values."""
        counts = torch.bincount(query, minlength=len(self._threshold))
        ends = counts.cumsum(0)
        full = (counts >= self._k).nonzero().flatten()
        if len(full):
            keys = _sorted(_sort_keys(query, value))[(ends - counts)[full] + self._k - 1]
            self._threshold[full, 0] = torch.maximum(self._threshold[full, 0], _values_of_keys(keys, full))


def rank_entries(
    query: torch.Tensor, score: torch.Tensor, row: torch.Tensor, k: int, ids: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort entries and keep the top k of each query.

    The order is by query, then score (descending), then id (descending in UTF-8 bytes).

    Args:
        query, score, row: parallel tensors [P]: int64, float32 without NaN, int64; pairs of query and row are unique.
        k: entries to keep per query.
        ids: ids by row; only ids of tied rows are read.
    """
    order = _argsort(_sort_keys(query, score))
    query, score, row = query[order], score[order], row[order]
    rank = _ranks(query)
    if len(query) > 1:
        tied = (query[1:] == query[:-1]) & (score[1:] == score[:-1])
        if bool(tied.any()):
            row = _order_ties(tied, rank, query, score, row, k, ids)
    keep = _nonzero(rank < k)
    return query[keep], score[keep], row[keep]


def to_arrays(query: torch.Tensor, score: torch.Tensor, row: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Convert sorted entries to scores [count, C] float32 and rows [count, C] int64, padded with -inf and -1."""
    rank = _ranks(query)
    width = int(rank.max()) + 1 if len(rank) else 0
    scores = score.new_full((count, width), -torch.inf)
    rows = row.new_full((count, width), -1)
    scores[query, rank], rows[query, rank] = score, row
    return scores.cpu().numpy(), rows.cpu().numpy()


def merge(parts: Sequence[tuple[np.ndarray, np.ndarray]], ids: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The top k of partial results from disjoint sets of passages, equal to the result of one search of all of them.

    Args:
        parts: (scores [Q, C] float32, rows [Q, C] int64) returned by searches for at least k results each (or for all
            of their passages); padding has row -1.
        ids: ids of all N rows.
        k: results per query, at least 1.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, best first.

    Raises:
        ValueError: the parts are not of the same queries, or there are none.
    """
    if not parts or len({len(array) for part in parts for array in part}) != 1 or k < 1:
        raise ValueError("parts, k: expected lists of the same queries and a number above 0")
    score = torch.from_numpy(np.concatenate([scores for scores, _ in parts], axis=1))
    row = torch.from_numpy(np.concatenate([rows for _, rows in parts], axis=1))
    query = torch.arange(len(row))[:, None].expand_as(row)
    found = row >= 0
    return to_arrays(*rank_entries(query[found], score[found], row[found], k, ids), len(row))


def _kth_lower_bound(products: torch.Tensor, k: int) -> torch.Tensor:
    """A lower bound [Q, 1] of the k-th highest entry in each row of `products` [Q, n], usually close to it.

    It is the k-th highest of the maxima over groups of columns, which is much cheaper to compute.
    """
    width = products.shape[1] // (4 * k)
    if width > 1:
        products = products[:, : products.shape[1] // width * width].unflatten(1, (-1, width)).amax(dim=2)
    if products.device.type == "cpu":
        return torch.from_numpy(np.partition(products.numpy(), -k, axis=1)[:, -k, None])
    return products.topk(k, dim=1).values[:, -1:]


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the true values in the flattened `mask`; indexing by them is faster than by the mask."""
    # numpy is several times faster than torch on a CPU.
    return (
        torch.from_numpy(np.flatnonzero(mask.numpy()))
        if mask.device.type == "cpu"
        else mask.flatten().nonzero().flatten()
    )


def _entries_at_least(products: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, column and value of the entries of `products` [Q, n] that are at least `least` [Q, 1]."""
    if products.device.type == "cpu":
        flat = _nonzero(torch.from_numpy(products.numpy() >= least.numpy()))
    else:
        flat = _nonzero(products >= least)
    query = flat.div(products.shape[1], rounding_mode="floor")
    return query, flat - query * products.shape[1], products.flatten()[flat]


def _sort_keys(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Integer keys that sort by query and, within a query, by value, descending."""
    # The bits of floats >= 0, read as integers, are in order; those of negative floats are if all but the sign is
    # flipped.
    bits = (value + 0.0).view(torch.int32).long()
    return (query << 32) - torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _values_of_keys(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The values from which `_sort_keys` made the keys of these queries."""
    ascending = (query << 32) - keys
    return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).int().view(torch.float32)


def _sorted(keys: torch.Tensor) -> torch.Tensor:
    """`keys`, ascending."""
    # numpy sorts several times faster than torch on a CPU.
    return torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort().values


def _argsort(keys: torch.Tensor) -> torch.Tensor:
    """Positions that sort `keys`, ascending."""
    return torch.from_numpy(np.argsort(keys.numpy())) if keys.device.type == "cpu" else keys.argsort()


def _ranks(query: torch.Tensor) -> torch.Tensor:
    """The position of each entry among those of its query; `query` is ascending."""
    counts = torch.bincount(query)
    positions = torch.arange(len(query), device=query.device)
    return positions - (counts.cumsum(0) - counts)[query]


def _order_ties(
    tied: torch.Tensor,
    rank: torch.Tensor,
    query: torch.Tensor,
    score: torch.Tensor,
    row: torch.Tensor,
    k: int,
    ids: Sequence[str],
) -> torch.Tensor:
    """`row` [P] of sorted entries with the rows of equal scores sorted too (index/ties.py).

    `tied` [P-1] is whether entry i ties with entry i + 1. As many ids as there are ties are read at once: a loop over
    queries, as in `order_ties`, would be slower.
    """
    no = tied.new_zeros(1)
    follows = torch.cat([no, tied])
    positions = (follows | torch.cat([tied, no])).nonzero().flatten()
    group = (~follows[positions]).cumsum(0) - 1
    # Only groups of ties that begin within the top k matter.
    firsts = rank[positions][~follows[positions]]
    positions, group = positions[firsts[group] < k], group[firsts[group] < k]
    rows, inverse = np.unique(row[positions].cpu().numpy(), return_inverse=True)
    ranks = id_ranks([ids[number] for number in rows.tolist()])[inverse]
    order = best_first(score[positions].cpu().numpy(), ranks, query[positions].cpu().numpy())
    row = row.clone()
    row[positions] = row[positions[torch.from_numpy(order).to(row.device)]]
    return row


def _block_top_k(scores: torch.Tensor, k: int, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of `scores` [Q, n] and their columns, both [Q, k]; ties at rank k are broken by highest id."""
    # The (k+1)-th score shows whether there is a tie at rank k.
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if best.shape[1] == k:
        return best, columns
    tied = (best[:, k - 1] == best[:, k]).nonzero().flatten()
    best, columns = best[:, :k], columns[:, :k].clone()
    if len(tied):
        columns[tied] = _break_ties_by_id(scores[tied], best[tied], columns[tied], block.id_ranks)
    return best, columns


def _break_ties_by_id(
    scores: torch.Tensor, best: torch.Tensor, columns: torch.Tensor, id_ranks: torch.Tensor
) -> torch.Tensor:
    """Columns [Q, k] of the top k of `scores` [Q, n]; ties at rank k are broken by the highest `id_ranks` [n].

    `best` and `columns` [Q, k] are the top k with ties broken arbitrarily.
    """
    cut = best[:, -1:]
    tied = torch.where(scores == cut, id_ranks, -1).topk(best.shape[1], dim=1).indices
    # Scores above the k-th stay; the rest are the tied columns with the highest ids.
    above = (best > cut).sum(dim=1, keepdim=True)
    position = torch.arange(best.shape[1], device=best.device).expand_as(best)
    return torch.where(position < above, columns, tied.gather(1, (position - above).clamp_min(0)))
