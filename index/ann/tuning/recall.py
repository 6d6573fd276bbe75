"""Recall@k measured against exact search, with an interval for the mean.

Recall@k of a query is the share of k passages found that are right: whose exact inner product with the query is at
least that of the k-th exact nearest passage. So of passages that score alike (duplicates, boilerplate) any are right,
however many they are. Inner products q·v are compared to within their rounding in float32, 1e-6 · |q| · |v| each.

A setting meets the target when the lower end of a one-sided 95 % interval for the mean recall (Student's t over the
queries) reaches it, so that other queries of the same kind may be expected to meet it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from index.ann.train import read_rows, sample_rows
from index.exact import search as exact
from index.files import InputError
from index.store.parts import Part
from index.store.reader import EmbeddingStore
from index.store.row_numbers import RowNames

CONFIDENCE = 0.95
# Fewer tell too little about the mean for an interval by Student's t.
LEAST_QUERIES = 30
# Exact neighbours beyond k that are kept for ties with the k-th; where more are tied, passages found are scored anew.
SPARE = 16
# Inner products q·v in float32 differ by about this share of |q| |v| between one way of summing and another.
ROUNDING = 1e-6
# Bytes of vectors that are scored anew at once.
SCORED_BYTES = 2**26


@dataclass(frozen=True)
class Target:
    """A promise to keep: recall@k of at least `recall`."""

    recall: float
    k: int = 10
    queries: np.ndarray | None = None
    """Vectors [Q, D] float32 of real queries; none takes passages, whose own rows do not count."""
    held_out: int = 2000
    """How many passages, where there are no queries."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise InputError(f"--target-recall: expected more than 0 and at most 1, found {self.recall}")
        if self.k < 1:
            raise InputError(f"--k: expected at least 1, found {self.k}")
        if self.queries is not None and len(self.queries) < LEAST_QUERIES:
            raise InputError(f"--queries: expected at least {LEAST_QUERIES} to measure by, found {len(self.queries)}")
        if self.held_out < LEAST_QUERIES:
            raise InputError(f"--held-out: expected at least {LEAST_QUERIES} to measure by, found {self.held_out}")

    def held_out_rows(self, rows: int, seed: int) -> np.ndarray:
        """The rows of a store that serve as queries: none where there are real ones."""
        if self.queries is not None:
            return np.empty(0, np.int64)
        # Half of a small store.
        if rows < 2 * LEAST_QUERIES:
            raise InputError(
                f"--target-recall: expected at least {2 * LEAST_QUERIES} passages to measure by {LEAST_QUERIES}, or "
                f"--queries, found {rows} passages"
            )
        # Another seed than the training sample's: its first rows would be these.
        return sample_rows(rows, min(self.held_out, rows // 2), seed ^ 0x5EED)


@dataclass(frozen=True)
class Ties:
    """What tells whether a passage is tied with the k-th nearest, where there are too many of them to be listed."""

    least: np.ndarray
    """[Q] float64: what the exact inner product and its rounding must reach."""
    unlisted: np.ndarray
    """[Q] bool: whether passages that are not listed may reach it."""
    vectors_of: Callable[[np.ndarray], np.ndarray]
    """Ascending rows [n] -> their vectors [n, D] float32."""

    def are_right(self, queries: np.ndarray, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether `rows` [P] are right for the queries at `places` [P]: bool [P]."""
        right = np.empty(len(rows), bool)
        step = max(1, SCORED_BYTES // (8 * queries.shape[1]))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            unique, inverse = np.unique(rows[some], return_inverse=True)
            products, errors = exact_products(queries[places[some]], self.vectors_of(unique)[inverse])
            right[some] = products + errors >= self.least[places[some]]
        return right


def exact_products(queries: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inner products of pairs of float32 vectors [P, D] each, float64 [P], and how float32 may round them, [P]."""
    left, right = queries.astype(np.float64), vectors.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.einsum("pd,pd->p", left, right), ROUNDING * norms


@dataclass(frozen=True)
class Truth:
    """Queries and what exact search finds for them."""

    queries: np.ndarray
    """[Q, D] float32."""
    own: np.ndarray | None
    """[Q] the queries' own rows, which do not count; none where they are not in the index."""
    rows: np.ndarray
    """[Q, n] the k nearest and the first of those tied with the k-th; -1 where there are no more."""
    k: int
    ties: Ties | None = None
    """None: `rows` has all that are tied."""


def find_truth(store: EmbeddingStore, target: Target, held_out: np.ndarray, without: np.ndarray | None = None) -> Truth:
    """Search the store exactly, for the target's queries or for the vectors of its rows `held_out`.

    Args:
        store: what is searched.
        target: its queries, if it has any, and its k.
        held_out: [Q] rows of the store, none of `without`, in order.
        without: rows of the store, in order, that are not searched; the others are numbered without gaps.

    Raises:
        InputError: the queries have another dimension than the store.
    """
    without = np.empty(0, np.int64) if without is None else without
    own = None
    if target.queries is not None:
        queries = np.ascontiguousarray(target.queries, np.float32)
        if queries.shape[1] != store.dim:
            raise InputError(f"--queries: expected vectors of {store.dim} dimensions, found {queries.shape[1]}")
    else:
        own, queries = held_out - np.searchsorted(without, held_out), read_rows(store, held_out)
    return truth_of(queries, store, without, target.k, own)


def truth_of(
    queries: np.ndarray, store: EmbeddingStore, without: np.ndarray, k: int, own: np.ndarray | None = None
) -> Truth:
    """What exact search finds for `queries` [Q, D] among the rows of a store.

    Args:
        without: rows of the store, in order, that are not searched; the others are numbered without gaps.
        own: [Q] the queries' own rows; none where they have none.
    """
    count = store.rows - len(without)
    norms = np.empty(count, np.float32)
    vectors = _numbered(Part(store).pieces(without), norms)
    scores, rows = exact.search(queries, vectors, RowNames(count), k + SPARE + 1)
    listed_all = rows.shape[1] == count
    if own is not None:
        scores, rows = without_own(scores, rows, own)
    k = min(k, rows.shape[1])
    # How float32 may round the inner product with a passage is this times the passage's norm.
    rounding = ROUNDING * np.linalg.norm(queries.astype(np.float64), axis=1)
    least = scores[:, k - 1] - rounding * norms[rows[:, k - 1]]
    listed = np.where(scores + rounding[:, None] * norms[rows] >= least[:, None], rows, -1)
    unlisted = scores[:, -1] + rounding * norms.max(initial=0.0) >= least
    if listed_all or not unlisted.any():
        return Truth(queries, own, listed, k)
    # What to add to a row to have that of the store: how many of `without` stand before it.
    gaps = without - np.arange(len(without))

    def vectors_of(wanted: np.ndarray) -> np.ndarray:
        return read_rows(store, wanted + np.searchsorted(gaps, wanted, side="right"))

    return Truth(queries, own, listed, k, Ties(least, unlisted, vectors_of))


def _numbered(vectors: Iterable[np.ndarray], norms: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The arrays with the row that each begins with; `norms` is filled with the lengths of their rows."""
    row = 0
    for some in vectors:
        norms[row : row + len(some)] = np.sqrt(np.einsum("nd,nd->n", some, some, dtype=np.float64))
        yield row, some
        row += len(some)


def recall_of_each(found: np.ndarray, truth: Truth) -> np.ndarray:
    """The recall [Q] float64 of the rows found [Q, k], -1 for none."""
    right = np.empty(found.shape, bool)
    # So many at once that their comparisons take 16 MiB.
    some = max(1, 2**24 // (found.shape[1] * truth.rows.shape[1]))
    for start in range(0, len(found), some):
        ours, theirs = found[start : start + some, :, None], truth.rows[start : start + some, None, :]
        right[start : start + some] = ((ours == theirs) & (ours >= 0)).any(axis=2)
    if truth.ties is not None:
        places, columns = np.nonzero(~right & (found >= 0) & truth.ties.unlisted[:, None])
        right[places, columns] = truth.ties.are_right(truth.queries, places, found[places, columns])
    return np.minimum(right.sum(axis=1), truth.k) / truth.k


def without_own(scores: np.ndarray, rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave `own` [Q] out of each query's `rows` [Q, n]; where it is not among them, the last goes."""
    width = rows.shape[1]
    own_place = rows == own[:, None]
    own_place[~own_place.any(axis=1), width - 1] = True
    kept = ~own_place
    return scores[kept].reshape(-1, width - 1), rows[kept].reshape(-1, width - 1)


def lower_end(recalls: np.ndarray) -> float:
    """The lower end of the one-sided interval for the mean of `recalls` [Q] (Student's t)."""
    from scipy import stats

    error = recalls.std(ddof=1) / np.sqrt(len(recalls))
    return float(recalls.mean() - stats.t.ppf(CONFIDENCE, len(recalls) - 1) * error)
