"""Recall@k measured against exact search, with a confidence interval for the mean.

A returned passage is correct if its exact inner product with the query is at least that of the k-th nearest passage of
exact search. Recall@k of a query is the number of correct passages among the k returned, divided by k. So of passages
with equal scores (duplicates, boilerplate) any count, however many there are. Inner products q·v are compared with a
tolerance of 1e-6 · |q| · |v|, their rounding error in float32.

A setting reaches the target if the lower end of a one-sided 95 % confidence interval for the mean recall (Student's t
over the queries) does, so that other queries from the same distribution can be expected to reach it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from index.ann.train import read_rows, sample_rows
from index.exact import search as exact
from index.files import ArgumentError
from index.store.parts import Part
from index.store.reader import EmbeddingStore
from index.store.row_numbers import RowNumberIds

CONFIDENCE = 0.95
# Minimum number of queries for a confidence interval by Student's t.
MIN_QUERIES = 30
# Exact neighbors kept beyond k, for ties at rank k. If there are more ties, returned passages are scored again.
SPARE = 16
# Relative difference, to |q| |v|, of inner products in float32 that are summed in different orders.
ROUNDING = 1e-6
# Bytes of vectors scored at once.
SCORED_BYTES = 2**26


@dataclass(frozen=True)
class Target:
    """A recall target: recall@k of at least `recall`."""

    recall: float
    k: int = 10
    queries: np.ndarray | None = None
    """[Q, D] float32, vectors of real queries. None: passages are used as queries, and a passage does not count as its
    own neighbor.
    """
    held_out: int = 2000
    """Number of passages used as queries if `queries` is None."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ArgumentError("target_recall", f"expected more than 0 and at most 1, found {self.recall}")
        if self.k < 1:
            raise ArgumentError("k", f"expected at least 1, found {self.k}")
        if self.queries is not None and len(self.queries) < MIN_QUERIES:
            raise ArgumentError(
                "queries", f"expected at least {MIN_QUERIES} to measure with, found {len(self.queries)}"
            )
        if self.held_out < MIN_QUERIES:
            raise ArgumentError("held_out", f"expected at least {MIN_QUERIES} to measure with, found {self.held_out}")

    def held_out_rows(self, rows: int, seed: int) -> np.ndarray:
        """Rows of a store that are used as queries; empty if there are real queries."""
        if self.queries is not None:
            return np.empty(0, np.int64)
        # At most half of the passages of a small store are held out.
        if rows < 2 * MIN_QUERIES:
            raise ArgumentError(
                "target_recall",
                f"expected at least {2 * MIN_QUERIES} passages to measure with {MIN_QUERIES}, or "
                f"queries, found {rows} passages",
            )
        # Another seed than the training sample's: with the same seed, these would be its first rows.
        return sample_rows(rows, min(self.held_out, rows // 2), seed ^ 0x5EED)


@dataclass(frozen=True)
class Ties:
    """Decides whether a passage is tied with the k-th nearest, if too many are tied to be listed."""

    least: np.ndarray
    """[Q] float64: the score of the k-th nearest passage, less the rounding error. Correct passages reach it."""
    unlisted: np.ndarray
    """[Q] bool: whether passages that are not listed may reach it."""
    vectors_of: Callable[[np.ndarray], np.ndarray]
    """Ascending rows [n] -> their vectors [n, D] float32."""

    def are_correct(self, queries: np.ndarray, query_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether each of `rows` [P] is correct for the query at the same position of `query_rows` [P]: bool [P]."""
        right = np.empty(len(rows), bool)
        step = max(1, SCORED_BYTES // (8 * queries.shape[1]))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            unique, inverse = np.unique(rows[block], return_inverse=True)
            products, errors = exact_products(queries[query_rows[block]], self.vectors_of(unique)[inverse])
            right[block] = products + errors >= self.least[query_rows[block]]
        return right


def exact_products(queries: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products [P] float64 of pairs of float32 vectors [P, D], and a bound [P] on their float32 error."""
    left, right = queries.astype(np.float64), vectors.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.einsum("pd,pd->p", left, right), ROUNDING * norms


@dataclass(frozen=True)
class Truth:
    """Queries and their exact nearest neighbors."""

    queries: np.ndarray
    """[Q, D] float32."""
    own: np.ndarray | None
    """[Q] int64, the rows of passages used as queries, which do not count; None if queries are not in the index."""
    rows: np.ndarray
    """[Q, n] int64, the k nearest rows and the first of those tied with the k-th, padded with -1."""
    k: int
    ties: Ties | None = None
    """None if `rows` lists all ties."""


def find_truth(store: EmbeddingStore, target: Target, held_out: np.ndarray, without: np.ndarray | None = None) -> Truth:
    """Find the exact nearest neighbors of the target's queries or, if it has none, of the rows `held_out`.

    Args:
        store: the passages to search.
        target: its queries, if it has any, and its k.
        held_out: [Q] int64, ascending rows of the store, none of `without`.
        without: ascending rows of the store that are not searched; the others are renumbered without gaps.

    Raises:
        InputError: the queries have another dimension than the store.
    """
    without = np.empty(0, np.int64) if without is None else without
    own = None
    if target.queries is not None:
        queries = np.ascontiguousarray(target.queries, np.float32)
        if queries.shape[1] != store.dim:
            raise ArgumentError("queries", f"expected vectors of {store.dim} dimensions, found {queries.shape[1]}")
    else:
        own, queries = held_out - np.searchsorted(without, held_out), read_rows(store, held_out)
    return truth_of(queries, store, without, target.k, own)


def truth_of(
    queries: np.ndarray, store: EmbeddingStore, without: np.ndarray, k: int, own: np.ndarray | None = None
) -> Truth:
    """Find the exact nearest neighbors of `queries` [Q, D] float32 in a store.

    Args:
        queries: [Q, D] float32.
        store: the passages to search.
        without: ascending rows of the store that are not searched; the others are renumbered without gaps.
        k: neighbors per query.
        own: [Q] the queries' own rows, which are excluded; None if they have none.
    """
    count = store.rows - len(without)
    norms = np.empty(count, np.float32)
    vectors = _with_first_rows(Part(store).pieces(without), norms)
    scores, rows = exact.search(queries, vectors, RowNumberIds(count), k + SPARE + 1)
    listed_all = rows.shape[1] == count
    if own is not None:
        scores, rows = without_own(scores, rows, own)
    k = min(k, rows.shape[1])
    # Multiplied by the norm of a passage, the rounding error of the inner product with it.
    rounding = ROUNDING * np.linalg.norm(queries.astype(np.float64), axis=1)
    least = scores[:, k - 1] - rounding * norms[rows[:, k - 1]]
    listed = np.where(scores + rounding[:, None] * norms[rows] >= least[:, None], rows, -1)
    unlisted = scores[:, -1] + rounding * norms.max(initial=0.0) >= least
    if listed_all or not unlisted.any():
        return Truth(queries, own, listed, k)
    # Maps a renumbered row back to the store: add the number of rows of `without` before it.
    gaps = without - np.arange(len(without))

    def vectors_of(wanted: np.ndarray) -> np.ndarray:
        return read_rows(store, wanted + np.searchsorted(gaps, wanted, side="right"))

    return Truth(queries, own, listed, k, Ties(least, unlisted, vectors_of))


def _with_first_rows(vectors: Iterable[np.ndarray], norms: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors) for each array, and write the norms of its rows to `norms`."""
    row = 0
    for block in vectors:
        norms[row : row + len(block)] = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
        yield row, block
        row += len(block)


def recall_of_each(found: np.ndarray, truth: Truth) -> np.ndarray:
    """Recall [Q] float64 of each query.

    Args:
        found: [Q, k] int64, returned rows; -1 for none.
        truth: the exact neighbors.
    """
    right = np.empty(found.shape, bool)
    # Chunks whose comparisons take 16 MiB.
    step = max(1, 2**24 // (found.shape[1] * truth.rows.shape[1]))
    for start in range(0, len(found), step):
        ours, theirs = found[start : start + step, :, None], truth.rows[start : start + step, None, :]
        right[start : start + step] = ((ours == theirs) & (ours >= 0)).any(axis=2)
    if truth.ties is not None:
        query_rows, columns = np.nonzero(~right & (found >= 0) & truth.ties.unlisted[:, None])
        right[query_rows, columns] = truth.ties.are_correct(truth.queries, query_rows, found[query_rows, columns])
    return np.minimum(right.sum(axis=1), truth.k) / truth.k


def without_own(scores: np.ndarray, rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove `own` [Q] from the rows of each query ([Q, n]); if it is not among them, remove the last."""
    width = rows.shape[1]
    own_place = rows == own[:, None]
    own_place[~own_place.any(axis=1), width - 1] = True
    kept = ~own_place
    return scores[kept].reshape(-1, width - 1), rows[kept].reshape(-1, width - 1)


def lower_bound(recalls: np.ndarray) -> float:
    """Lower end of the one-sided confidence interval for the mean of `recalls` [Q] (Student's t)."""
    from scipy import stats

    error = recalls.std(ddof=1) / np.sqrt(len(recalls))
    return float(recalls.mean() - stats.t.ppf(CONFIDENCE, len(recalls) - 1) * error)
