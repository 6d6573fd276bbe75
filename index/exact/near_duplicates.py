"""Near-duplicates: pairs of rows whose cosine similarity reaches a threshold, in tiles of exact products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from index.exact.products import ROUND32, full_precision
from index.exact.windows import Shards
from index.files import InputError

# Rows that are compared with all later rows in one pass over the shards, and rows of a tile of products.
WINDOW_ROWS = {"cpu": 16384, "cuda": 131072}
TILE_ROWS = {"cpu": 2048, "cuda": 4096}
# Products of pairs of vectors computed at once in float64.
PRODUCTS_AT_ONCE = 2**22
# A tile of which this fraction is selected is multiplied again in float64 as a whole.
DENSE = 1 / 16


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates of each row. Arrays of the length N, whatever the number of pairs."""

    group: np.ndarray
    """int64 [N]: the first row of each row's group. Rows are in one group if a chain of pairs connects them."""
    nearest: np.ndarray
    """int64 [N]: the most similar other row, the first of equals; -1 if none reaches the threshold."""
    score: np.ndarray
    """float32 [N]: the cosine similarity of `nearest`; -1 if there is none."""

    def groups(self) -> Iterator[np.ndarray]:
        """Rows of each group of two or more, ascending; groups in the order of their first rows."""
        order = np.argsort(self.group, kind="stable")
        starts = np.flatnonzero(np.diff(self.group[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end - start > 1:
                yield order[start:end]


def near_duplicates(
    shards: Callable[[], Shards],
    ids: Sequence[str],
    threshold: float,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> NearDuplicates:
    """Find all pairs of rows whose cosine similarity is at least a threshold, exactly.

    Float32 products, with a bound on their error, select pairs, whose cosine similarity is then computed in float64 and
    rounded to float32. Memory is linear in the number of rows: pairs are not kept, only groups and the nearest row of
    each row. Time is quadratic.

    Args:
        shards: returns (first row, vectors [n, D] of any floating dtype), in order and without gaps, each time anew.
        ids: ids of the N rows, for messages.
        threshold: smallest cosine similarity of a pair, above -1 and at most 1.
        device: where to multiply. Default: "cpu".
        progress: called with the number of pairs of rows that were just compared.

    Raises:
        InputError: a vector is zero, NaN or infinite; the message names its row and id.
    """
    # Cosines are computed in float64, which Apple's GPUs do not have.
    target = torch.device("cpu" if torch.device(device).type == "mps" else device)
    search = _Search(len(ids), threshold)
    with full_precision(target):
        for start in range(0, len(ids), WINDOW_ROWS[target.type]):
            window = _Vectors.of(_rows(shards(), start, WINDOW_ROWS[target.type]), start, ids, target)
            for block in _blocks(shards(), start, ids, target):
                for part in window.split(TILE_ROWS[target.type]):
                    search.compare(part, block)
                    if progress is not None:
                        progress(_pairs(part, block))
    search.components.join()
    return NearDuplicates(search.components.group, search.nearest, search.score)


@dataclass(frozen=True)
class _Vectors:
    """Consecutive rows on the device."""

    first: int
    raw: Tensor
    norms: Tensor
    """float64 [n]"""
    unit: Tensor
    """Rows of `raw` divided by their norms, float32."""

    @classmethod
    def of(cls, vectors: np.ndarray, first: int, ids: Sequence[str], device: torch.device) -> _Vectors:
        raw = torch.tensor(vectors, dtype=torch.float32, device=device)
        norms = torch.linalg.vector_norm(raw, dim=1, dtype=torch.float64)
        usable = norms.isfinite() & (norms > 0)
        if not bool(usable.all()):
            row = int(usable.int().argmin())
            found = "zeros" if float(norms[row]) == 0 else "NaN or infinity"
            raise InputError(
                f"row {first + row}, {ids[first + row]!r}: expected a vector with a direction, found {found}"
            )
        return cls(first, raw, norms, (raw / norms[:, None]).float())

    def __len__(self) -> int:
        return len(self.raw)

    def split(self, rows: int) -> Iterator[_Vectors]:
        """Parts of at most `rows` rows."""
        for start in range(0, len(self), rows):
            some = slice(start, start + rows)
            yield _Vectors(self.first + start, self.raw[some], self.norms[some], self.unit[some])


class _Search:
    """What has been found so far."""

    def __init__(self, rows: int, threshold: float) -> None:
        self.components = _Components(rows)
        self.nearest = np.full(rows, -1, dtype=np.int64)
        self.score = np.full(rows, -1, dtype=np.float32)
        self._threshold = np.float32(threshold)

    def compare(self, left: _Vectors, right: _Vectors) -> None:
        """Compare rows of `left` with later rows of `right`."""
        if right.first + len(right) <= left.first + 1:
            return
        products = left.unit @ right.unit.T
        # Rounding of the sum, of both unit vectors and of the result.
        floor = float(self._threshold) - 1.01 * (left.raw.shape[1] + 4) * ROUND32
        selected = products >= floor
        if left.first + len(left) > right.first:
            own = torch.arange(len(left), device=products.device)[:, None] + left.first
            selected &= torch.arange(len(right), device=products.device) + right.first > own
        if not bool(selected.any()):
            return
        one, other = selected.nonzero(as_tuple=True)
        cosines = _cosines(left, right, one, other).cpu().numpy()
        found = np.flatnonzero(cosines >= self._threshold)
        rows, others = one.cpu().numpy()[found] + left.first, other.cpu().numpy()[found] + right.first
        self._keep_nearest(rows, others, cosines[found])
        self._keep_nearest(others, rows, cosines[found])
        self.components.add(rows, others)

    def _keep_nearest(self, rows: np.ndarray, others: np.ndarray, scores: np.ndarray) -> None:
        order = np.lexsort((others, -scores, rows))
        best = order[np.flatnonzero(np.diff(rows[order], prepend=-1))]
        rows, others, scores = rows[best], others[best], scores[best]
        # Of equals the first row, in whatever order tiles are compared.
        equal = (scores == self.score[rows]) & (others < self.nearest[rows])
        better = (scores > self.score[rows]) | (self.nearest[rows] < 0) | equal
        self.nearest[rows[better]], self.score[rows[better]] = others[better], scores[better]


class _Components:
    """Connected components of a graph whose edges arrive in parts."""

    def __init__(self, rows: int) -> None:
        self.group = np.arange(rows)
        self._edges: list[np.ndarray] = []
        self._count = 0

    def add(self, rows: np.ndarray, others: np.ndarray) -> None:
        """Add edges; those within a component are not kept."""
        edges = np.stack([self.group[rows], self.group[others]])
        edges = edges[:, edges[0] != edges[1]]
        self._edges.append(edges)
        self._count += edges.shape[1]
        if self._count > max(len(self.group), PRODUCTS_AT_ONCE):
            self.join()

    def join(self) -> None:
        """Join the components that edges connect."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not self._count:
            return
        edges, size = np.concatenate(self._edges, axis=1), len(self.group)
        graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(size, size))
        _, component = connected_components(graph.tocsr(), directed=False)
        _, first = np.unique(component, return_index=True)
        self.group = first[component[self.group]]
        self._edges, self._count = [], 0


def _cosines(left: _Vectors, right: _Vectors, one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarities [P] float32 of pairs of rows, computed in float64."""
    if len(one) > DENSE * len(left) * len(right):
        whole = (left.raw.double() @ right.raw.double().T) / left.norms[:, None] / right.norms
        return whole[one, other].float()
    found = torch.empty(len(one), device=one.device)
    step = max(1, PRODUCTS_AT_ONCE // max(1, left.raw.shape[1]))
    for start in range(0, len(one), step):
        some = slice(start, start + step)
        sums = (left.raw[one[some]].double() * right.raw[other[some]].double()).sum(dim=1)
        found[some] = (sums / left.norms[one[some]] / right.norms[other[some]]).float()
    return found


def _pairs(left: _Vectors, right: _Vectors) -> int:
    """Number of pairs of a row of `left` and a later row of `right`."""
    before = np.clip(np.arange(left.first, left.first + len(left)) + 1 - right.first, 0, len(right))
    return int((len(right) - before).sum())


def _rows(shards: Shards, start: int, count: int) -> np.ndarray:
    """Rows `start` to `start + count`, or to the last one."""
    parts = []
    for first, vectors in shards:
        if first >= start + count:
            break
        parts.append(np.asarray(vectors[max(0, start - first) : max(0, start + count - first)], dtype=np.float32))
    return np.concatenate(parts)


def _blocks(shards: Shards, start: int, ids: Sequence[str], device: torch.device) -> Iterator[_Vectors]:
    """The rows from `start`, in blocks of a tile."""
    for first, vectors in shards:
        for begin in range(max(0, start - first), len(vectors), TILE_ROWS[device.type]):
            block = np.asarray(vectors[begin : begin + TILE_ROWS[device.type]])
            yield _Vectors.of(block, first + begin, ids, device)
