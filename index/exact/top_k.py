"""Lists of the best: ranked by score and id, cut, merged; and kept for some queries while blocks of passages pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from index.exact.products import Approximation, Block, Queries
from index.exact.scores import block_scores, pair_scores
from index.exact.windows import Window

# Candidates of some queries that are kept beyond 8k a query before they are scored: 24 bytes each.
CANDIDATES = 2**22


class Best:
    """The k best passages so far for some queries.

    Of every block the passages that may be among the k best are kept as candidates, with bounds on their scores;
    `settle` gives those the bounds cannot exclude their true scores, while their vectors are still at hand.
    """

    def __init__(self, queries: Queries, k: int, ids: Sequence[str]) -> None:
        self.count = len(queries.vectors)
        self._queries = queries
        self._k = k
        self._ids = ids
        device = queries.vectors.device
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        # Parallel lists, ranked: query, score, row.
        self.query, self.score, self.row = nothing, nothing.float(), nothing
        # Parallel lists: query, bounds of the score, place in the window.
        self._none = (nothing, nothing.float(), nothing.float(), nothing)
        self._candidates = self._none
        self._added: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # How many there are, and how many of them were left when they were last looked through.
        self._waiting = self._kept = 0
        # No passage that scores below its query's entry [Q, 1] can still be among the best.
        self._floor = queries.vectors.new_full((self.count, 1), -torch.inf)
        self._bounded = False

    def _unbounded(self) -> bool:
        """Whether some query has no floor yet; once all have one they keep it, and a GPU is no more waited for."""
        self._bounded = self._bounded or not bool(self._floor.isinf().any())
        return not self._bounded

    def update(self, block: Block, window: Window) -> None:
        """Let the passages of a block of `window` compete."""
        if len(block.vectors) >= self._k and self._unbounded():
            # The floor of a whole block is higher than that of its first slice, and leaves fewer candidates.
            at_once = -(-self.count // len(block.slices()))
            for which in torch.arange(self.count, device=self._floor.device).split(at_once):
                self._update(block, which if at_once < self.count else None, window)
        else:
            for part in block.slices():
                self._update(part, None, window)
        if self._waiting > self._kept + self.count * self._k:
            self._raise_floor()
            if self._waiting > self.count * 8 * self._k + CANDIDATES:
                self.settle(window)

    def _found_floor(self, found: Approximation, which: torch.Tensor | None) -> torch.Tensor:
        """Raise the floor of the queries `which` to the k-th product of each, less its error; returns it [M, 1]."""
        kth = found.lower(_at_most_kth(found.products, self._k), found.absolute)
        if which is None:
            self._floor = kth = torch.maximum(self._floor, kth)
        else:
            self._floor[which] = kth = torch.maximum(self._floor[which], kth)
        return kth

    def _update(self, block: Block, which: torch.Tensor | None, window: Window) -> None:
        """Let the passages of a block compete for the queries `which` (none: all)."""
        # Where a product's error leaves too many candidates for a query, a better one is made.
        for in_half in (True, False):
            if in_half and (block.half is None or self._queries.half is None):
                continue
            which = self._choose(block, which, in_half)
            if which is None:
                return
        assert which is not None
        self._score_all(block, which, window)

    def settle(self, window: Window) -> None:
        """Score the candidates, whose vectors lie in `window`, and keep the best of them and of those kept before."""
        self._raise_floor()
        query, _, _, place = self._candidates
        errors = self._queries.sum_errors(window.norm)
        score = self._scores(query, place, errors, window)
        query, score = torch.cat([self.query, query]), torch.cat([self.score, score])
        row = torch.cat([self.row, window.rows[place]])
        self.query, self.score, self.row = ranked(query, score, row, self._k, self._ids)
        self._candidates = self._none
        self._waiting = self._kept = 0
        self._lift(self.query, self.score)

    def _scores(self, query: torch.Tensor, place: torch.Tensor, errors: torch.Tensor, window: Window) -> torch.Tensor:
        # Others may join while these are scored.
        parts = tuple(window.parts)
        if len(parts) == 1:
            return pair_scores(self._queries.vectors, parts[0][1], query, place, errors)
        scores = torch.empty(len(query), device=query.device)
        for begin, vectors in parts:
            here = _places((place >= begin) & (place < begin + len(vectors)))
            scores[here] = pair_scores(self._queries.vectors, vectors, query[here], place[here] - begin, errors)
        return scores

    def _choose(self, block: Block, which: torch.Tensor | None, in_half: bool) -> torch.Tensor | None:
        """Add the candidates for the queries `which` (none: all); returns those with too many, which get none."""
        found = self._queries.multiply(block, which, in_half)
        floor = self._floor if which is None else self._floor[which]
        if found.products.shape[1] >= self._k and self._unbounded():
            floor = self._found_floor(found, which)
        query, column, product = _at_least(found.products, found.least(floor))
        most = self._k + found.products.shape[1] // 16
        too_many = None
        # `query` ascends: one that has too many comes again that many places on.
        beyond = query[most:]
        again = beyond == query[: len(beyond)]
        if bool(again.any()):
            crowded = torch.zeros(len(floor), dtype=torch.bool, device=query.device)
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
        place: torch.Tensor,
        product: torch.Tensor,
        which: torch.Tensor | None,
    ) -> None:
        error = found.absolute.flatten()[query]
        whole = query if which is None else which[query]
        self._added.append((whole, found.lower(product, error), found.upper(product, error), place))
        self._waiting += len(query)

    def _score_all(self, block: Block, which: torch.Tensor, window: Window) -> None:
        """Score every passage of the block for the queries `which` and add the k best of each."""
        # Few queries at a time: float64 scores, and where many tie, the places of ids take twice the room of products.
        errors = self._queries.sum_errors(window.norm)
        for some in which.split(max(1, self.count // 8)):
            scores = block_scores(self._queries.vectors[some], block.full, errors[some])
            best, columns = _top(scores, min(self._k, scores.shape[1]), block)
            query = some.repeat_interleave(best.shape[1])
            self._added.append((query, best.flatten(), best.flatten(), columns.flatten() + block.start))
            self._waiting += len(query)

    def _raise_floor(self) -> None:
        """Raise the floor by the lower bounds of the candidates, and drop those that stay below."""
        parts = [self._candidates, *self._added]
        self._added = []
        query, lower, upper, place = (torch.cat(part) for part in zip(*parts, strict=True))
        self._lift(torch.cat([self.query, query]), torch.cat([self.score, lower]))
        keep = _places(upper >= self._floor[:, 0][query])
        self._candidates = (query[keep], lower[keep], upper[keep], place[keep])
        self._waiting = self._kept = len(self._candidates[0])

    def _lift(self, query: torch.Tensor, value: torch.Tensor) -> None:
        """Raise each query's floor to the k-th highest of its values."""
        counts = torch.bincount(query, minlength=len(self._floor))
        ends = counts.cumsum(0)
        full = (counts >= self._k).nonzero().flatten()
        if len(full):
            keys = _sorted(_keys(query, value))[(ends - counts)[full] + self._k - 1]
            self._floor[full, 0] = torch.maximum(self._floor[full, 0], _value_of(keys, full))


def ranked(
    query: torch.Tensor, score: torch.Tensor, row: torch.Tensor, k: int, ids: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best entries of each query, ranked: by query, then score descending, then id descending in UTF-8 bytes.

    Args:
        query, score, row: parallel lists [P]: int64, float32 without NaN, int64; no pair of query and row twice.
        ids: of the rows; only the ids of rows that tie are looked at.
    """
    order = _order(_keys(query, score))
    query, score, row = query[order], score[order], row[order]
    rank = _ranks(query)
    if len(query) > 1:
        tied = (query[1:] == query[:-1]) & (score[1:] == score[:-1])
        if bool(tied.any()):
            row = _order_ties(tied, rank, row, k, ids)
    keep = _places(rank < k)
    return query[keep], score[keep], row[keep]


def as_table(query: torch.Tensor, score: torch.Tensor, row: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranked lists as scores [count, C] float32 and rows [count, C] int64; places left over have -inf and row -1."""
    rank = _ranks(query)
    width = int(rank.max()) + 1 if len(rank) else 0
    scores = score.new_full((count, width), -torch.inf)
    rows = row.new_full((count, width), -1)
    scores[query, rank], rows[query, rank] = score, row
    return scores.cpu().numpy(), rows.cpu().numpy()


def merge(parts: Sequence[tuple[np.ndarray, np.ndarray]], ids: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of partial lists that were found in disjoint sets of passages, exactly as if found in one search.

    Args:
        parts: (scores [Q, C] float32, rows [Q, C] int64) of search.py's searches, C as large as it was asked for or as
            there were passages; row -1 marks places left over.
        ids: of all rows.
        k: how many to return, at least 1.

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
    return as_table(*ranked(query[found], score[found], row[found], k, ids), len(row))


def _at_most_kth(products: torch.Tensor, k: int) -> torch.Tensor:
    """A number [Q, 1] for each row of `products` [Q, n] that at least k of its entries reach; usually k and a few.

    The k-th highest of the maxima of groups of columns: k groups have an entry that high. Finding it costs a small
    part of what the k-th highest entry would.
    """
    width = products.shape[1] // (4 * k)
    if width > 1:
        products = products[:, : products.shape[1] // width * width].unflatten(1, (-1, width)).amax(dim=2)
    if products.device.type == "cpu":
        return torch.from_numpy(np.partition(products.numpy(), -k, axis=1)[:, -k, None])
    return products.topk(k, dim=1).values[:, -1:]


def _places(mask: torch.Tensor) -> torch.Tensor:
    """The places, in the flattened `mask`, of what is true: to index by them is quicker than to index by the mask."""
    # Several times as fast as torch's own on a processor.
    return (
        torch.from_numpy(np.flatnonzero(mask.numpy()))
        if mask.device.type == "cpu"
        else mask.flatten().nonzero().flatten()
    )


def _at_least(products: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, column and value of the entries of `products` [Q, n] that are not below `least` [Q, 1]."""
    if products.device.type == "cpu":
        flat = _places(torch.from_numpy(products.numpy() >= least.numpy()))
    else:
        flat = _places(products >= least)
    query = flat.div(products.shape[1], rounding_mode="floor")
    return query, flat - query * products.shape[1], products.flatten()[flat]


def _keys(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Whole numbers that sort by query and, within a query, by value, descending."""
    # As whole numbers the bits of floats >= 0 are in order; those of negative ones are, with all but the sign turned.
    bits = (value + 0.0).view(torch.int32).long()
    return (query << 32) - torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value_of(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The values that `_keys` was given with these queries."""
    ascending = (query << 32) - keys
    return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).int().view(torch.float32)


def _sorted(keys: torch.Tensor) -> torch.Tensor:
    """`keys`, ascending."""
    # On a processor numpy sorts several times as fast as torch.
    return torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort().values


def _order(keys: torch.Tensor) -> torch.Tensor:
    """The places of `keys`, ascending."""
    return torch.from_numpy(np.argsort(keys.numpy())) if keys.device.type == "cpu" else keys.argsort()


def _ranks(query: torch.Tensor) -> torch.Tensor:
    """The place of each entry among those of its query; `query` ascends."""
    counts = torch.bincount(query)
    places = torch.arange(len(query), device=query.device)
    return places - (counts.cumsum(0) - counts)[query]


def _order_ties(tied: torch.Tensor, rank: torch.Tensor, row: torch.Tensor, k: int, ids: Sequence[str]) -> torch.Tensor:
    """`row` [P] with the rows of equal scores in the order of their ids; `tied` [P-1]: entry i ties with i + 1."""
    no = tied.new_zeros(1)
    follows = torch.cat([no, tied])
    places = (follows | torch.cat([tied, no])).nonzero().flatten()
    group = (~follows[places]).cumsum(0) - 1
    # A group counts if its first entry is within the best k.
    firsts = rank[places][~follows[places]]
    places, group = places[firsts[group] < k], group[firsts[group] < k]
    rows, inverse = np.unique(row[places].cpu().numpy(), return_inverse=True)
    names = [ids[number] for number in rows.tolist()]
    # Python compares text by code points, which is the order of its UTF-8 bytes.
    ascending = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    height = np.empty_like(ascending)
    height[ascending] = np.arange(len(ascending))
    order = torch.from_numpy(np.lexsort((-height[inverse], group.cpu().numpy()))).to(row.device)
    row = row.clone()
    row[places] = row[places[order]]
    return row


def _top(scores: torch.Tensor, k: int, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of `scores` [Q, n] and their columns, both [Q, k]; ties at the cut go to the highest ids."""
    # One more than wanted shows whether equal scores lie on both sides of the cut.
    best, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if best.shape[1] == k:
        return best, columns
    tied = (best[:, k - 1] == best[:, k]).nonzero().flatten()
    best, columns = best[:, :k], columns[:, :k].clone()
    if len(tied):
        columns[tied] = _highest_ids_at_the_cut(scores[tied], best[tied], columns[tied], block.places)
    return best, columns


def _highest_ids_at_the_cut(
    scores: torch.Tensor, best: torch.Tensor, columns: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Columns [Q, k] of the top k of `scores` [Q, n], where ties with the k-th go to the highest `places` [n].

    `best`, `columns` [Q, k] are the top k with ties decided arbitrarily.
    """
    cut = best[:, -1:]
    tied = torch.where(scores == cut, places, -1).topk(best.shape[1], dim=1).indices
    # Above the cut nothing changes; from there on come the tied ones, highest id first.
    above = (best > cut).sum(dim=1, keepdim=True)
    position = torch.arange(best.shape[1], device=best.device).expand_as(best)
    return torch.where(position < above, columns, tied.gather(1, (position - above).clamp_min(0)))
