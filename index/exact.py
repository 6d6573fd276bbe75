"""Exact nearest-neighbour search by inner product, block by block, with ties decided by id."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from index.files import InputError

# Scores of one block and some queries that are held at once: 64 MiB in float32.
SCORES_AT_ONCE = 2**24


def search(
    queries: np.ndarray,
    shards: Iterable[tuple[int, np.ndarray]],
    ids: Sequence[str],
    k: int,
    *,
    block_rows: int = 16384,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` passages of highest inner product for each query, exactly.

    Passages rank by float32 score, descending, and among equal scores by id, descending in its UTF-8 bytes: the order
    of trec_eval. That holds at the cut too: of the passages tied for the last places, those of highest id are taken.
    Memory is constant: queries, results, one block of passages and 64 MiB of scores. The block size changes nothing
    but the rounding of the products, of the order of 1e-7.

    Args:
        queries: [Q, D], float32.
        shards: (first row, vectors [n, D] of any floating dtype), in order and without gaps; read once.
        ids: the ids of the N rows.
        k: how many to return, at least 1.
        block_rows: passages multiplied at once.
        device: where the products are made; precision is full float32 there, whatever the global settings.
        progress: called with the number of rows after each block.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, best first.

    Raises:
        InputError: a query or passage holds NaN or infinity, or the products would overflow; the message names the
            row, and the id of a passage.
        ValueError: shapes or row numbers do not fit together.
    """
    if k < 1 or block_rows < 1:
        raise ValueError(f"k, block_rows: expected numbers above 0, found {k}, {block_rows}")
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape [Q, D], found {queries.shape}")
    order = _IdOrder(ids, device)
    with _full_precision(device):
        moved = _to_device(queries, device)
        largest = _largest(moved, "query {}".format)
        chunk = max(1, SCORES_AT_ONCE // min(block_rows, max(1, len(ids))))
        parts = [_Best(part, k, order) for part in moved.split(chunk) if len(part)]
        seen = 0
        for first, block in _blocks(shards, block_rows):
            if first != seen or first + len(block) > len(ids) or block.shape[1] != queries.shape[1]:
                raise ValueError(
                    f"shards: expected vectors of {queries.shape[1]} dimensions for rows from {seen} up to "
                    f"{len(ids)}, found {block.shape} at row {first}"
                )
            passages = _to_device(block, device)
            bound = _largest(passages, partial(_passage_name, ids, first))
            if largest * bound * queries.shape[1] > torch.finfo(torch.float32).max:
                raise InputError(f"rows {first} to {first + len(block) - 1}: inner products overflow float32")
            for part in parts:
                part.update(first, passages)
            seen += len(block)
            if progress is not None:
                progress(len(block))
        if seen != len(ids):
            raise ValueError(f"shards: expected {len(ids)} rows, one for each id, found {seen}")
        if not parts or not seen:
            return np.empty((len(queries), min(k, seen)), np.float32), np.empty((len(queries), min(k, seen)), np.int64)
        for part in parts:
            part.sort()
        scores = torch.cat([part.scores for part in parts]).cpu().numpy()
        rows = torch.cat([part.rows for part in parts]).cpu().numpy()
        return scores, rows


class _IdOrder:
    """The place of each row's id among all ids, highest id highest; sorted at the first tie, which may never come."""

    def __init__(self, ids: Sequence[str], device: str | torch.device) -> None:
        self._ids = ids
        self._device = device
        self._places: torch.Tensor | None = None

    @property
    def places(self) -> torch.Tensor:
        """[N] int64."""
        if self._places is None:
            # Python compares text by code points, which is the order of its UTF-8 bytes.
            ascending = np.array(sorted(range(len(self._ids)), key=self._ids.__getitem__), np.int64)
            places = np.empty_like(ascending)
            places[ascending] = np.arange(len(ascending))
            self._places = torch.from_numpy(places).to(self._device)
        return self._places


class _Best:
    """The best passages so far for some queries [Q, D].

    `scores` and `rows` [Q, C] hold, for every query, at least its k best of all rows seen; `sort` leaves exactly those.
    """

    def __init__(self, queries: torch.Tensor, k: int, order: _IdOrder) -> None:
        self._queries = queries
        self._k = k
        self._order = order
        self.scores = queries.new_empty((len(queries), 0))
        self.rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        # No passage that scores below its query's entry [Q, 1] can still be among the best.
        self._floor = queries.new_full((len(queries), 1), -torch.inf)

    def update(self, first: int, passages: torch.Tensor) -> None:
        """Let `passages` [n, D], the rows from `first` on, compete."""
        products = self._queries @ passages.T
        # Usually few products reach the floor, and are picked out much faster than a block's own top k is found.
        found = _picked(products, products >= self._floor, 2 * self._k)
        if found is None:
            found = _top(products, self._k, lambda: self._order.places[first : first + len(passages)])
        scores, columns = found
        self.scores = torch.cat([self.scores, scores], dim=1)
        self.rows = torch.cat([self.rows, columns + first], dim=1)
        if self.scores.shape[1] > 2 * self._k or bool(self._floor.isinf().any()):
            self.sort()

    def sort(self) -> None:
        """Keep exactly the k best, best first."""
        scores, order = self.scores.sort(dim=1, descending=True, stable=True)
        scores = scores[:, : self._k + 1]
        if (scores[:, 1:] == scores[:, :-1]).any():
            by_id = self._order.places[self.rows].argsort(dim=1, descending=True)
            order = by_id.gather(1, self.scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
        order = order[:, : self._k]
        self.scores, self.rows = self.scores.gather(1, order), self.rows.gather(1, order)
        if self.scores.shape[1] == self._k:
            self._floor = self.scores[:, -1:].clone()


def _picked(products: torch.Tensor, chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The `chosen` entries of `products` [Q, n] and their columns, both [Q, c], filled up with -inf and column 0.

    None when a row has more than `most` of them.
    """
    if int(chosen.count_nonzero()) > len(products) * most:
        return None
    queries, columns = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(queries, minlength=len(products))
    width = int(counts.max())
    if width > most:
        return None
    # `queries` ascends: an entry's place in its row is its distance from the row's first.
    places = torch.arange(len(queries), device=queries.device) - (counts.cumsum(0) - counts)[queries]
    scores = products.new_full((len(products), width), -torch.inf)
    scores[queries, places] = products[queries, columns]
    picked = columns.new_zeros((len(products), width))
    picked[queries, places] = columns
    return scores, picked


def _top(products: torch.Tensor, k: int, places: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of `products` [Q, n] and their columns, both [Q, min(k, n)]; ties at the cut go to the highest places.

    `places` gives the [n] places of the columns' ids; it is asked only when there is a tie at a cut.
    """
    count = min(k, products.shape[1])
    # One more than wanted shows whether equal scores lie on both sides of the cut.
    scores, columns = products.topk(min(count + 1, products.shape[1]), dim=1)
    if scores.shape[1] == count:
        return scores, columns
    tied = (scores[:, count - 1] == scores[:, count]).nonzero().flatten()
    scores, columns = scores[:, :count], columns[:, :count]
    # Few queries at a time: the places of their ids take twice the room of their scores.
    for some in tied.split(max(1, len(products) // 8)):
        columns[some] = _highest_ids_at_the_cut(products[some], scores[some], columns[some], places())
    return scores, columns


def _highest_ids_at_the_cut(
    products: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Columns [Q, k] of the top k of `products` [Q, n], where ties with the k-th score go to the highest `places` [n].

    `scores`, `columns` [Q, k] are the top k with ties decided arbitrarily.
    """
    cut = scores[:, -1:]
    tied = torch.where(products == cut, places, -1).topk(scores.shape[1], dim=1).indices
    # Above the cut nothing changes; from there on come the tied ones, highest id first.
    above = (scores > cut).sum(dim=1, keepdim=True)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return torch.where(position < above, columns, tied.gather(1, (position - above).clamp_min(0)))


def _passage_name(ids: Sequence[str], first: int, row: int) -> str:
    return f"row {first + row}, passage {ids[first + row]!r}"


def _blocks(shards: Iterable[tuple[int, np.ndarray]], block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    for first, vectors in shards:
        for start in range(0, len(vectors), block_rows):
            yield first + start, vectors[start : start + block_rows]


def _to_device(vectors: np.ndarray, device: str | torch.device) -> torch.Tensor:
    # Always a copy: a memory map is read-only, which torch cannot express, and is read from disk once this way.
    return torch.from_numpy(np.array(vectors, dtype=np.float32)).to(device)


def _largest(vectors: torch.Tensor, name: Callable[[int], str]) -> float:
    """The largest magnitude in `vectors` [n, D], which must be finite."""
    if not vectors.numel():
        return 0.0
    smallest, largest = (float(value) for value in torch.aminmax(vectors))
    magnitude = max(abs(smallest), abs(largest))
    if not np.isfinite(magnitude):
        row = int(vectors.isfinite().all(dim=1).int().argmin())
        raise InputError(f"{name(row)}: expected a finite vector, found NaN or infinity")
    return magnitude


@contextlib.contextmanager
def _full_precision(device: str | torch.device) -> Iterator[None]:
    """Plain float32 products, even where the caller trains with TF32 or autocast."""
    # These can be read and restored whether the caller set the precision here or by one of the older functions.
    modules: Any = torch.backends  # torch makes some of these names at run time
    backends = (modules.cuda.matmul, modules.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
