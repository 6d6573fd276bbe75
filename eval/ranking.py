"""A run as arrays: the ranked passages of each query in trec_eval's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from index.files import InputError
from index.ties import best_first, id_ranks, order_ties

Run = dict[str, dict[str, float]]
"""Query id -> passage id -> score; higher is better."""


class RankedRun(Mapping[str, dict[str, float]]):
    """The ranked passages of Q queries, at most K each, stored in 8 bytes per entry (a dictionary takes about 100).

    The passages of a query are in trec_eval's order (index/ties.py). The class is a mapping of query id ->
    {passage id: score}, best first.

    Args:
        queries: ids of the Q queries.
        passages: passage ids that `rows` indexes, for example those of the corpus.
        rows: int [Q, K], in any order; -1 marks an empty entry, whose score is ignored.
        scores: [Q, K], any floating dtype, stored as float32.

    Raises:
        InputError: a score is NaN, or a query or a query's passage is repeated.
        ValueError: the shapes do not match.
    """

    def __init__(self, queries: Sequence[str], passages: Sequence[str], rows: np.ndarray, scores: np.ndarray) -> None:
        if rows.shape != scores.shape or rows.ndim != 2 or len(rows) != len(queries):
            raise ValueError(f"rows, scores: expected shape [{len(queries)}, K], found {rows.shape}, {scores.shape}")
        if rows.size and int(rows.max()) >= len(passages):
            raise ValueError(f"rows: expected rows of {len(passages)} passages, found {int(rows.max())}")
        self.queries = list(queries)
        self.passages = passages
        self.left_out = 0
        """Number of passages that `without` has removed."""
        self._cached_ids: frozenset[str] = frozenset()
        self._cached_rows: dict[str, int] = {}
        with np.errstate(over="ignore"):  # as in trec_eval, scores beyond float32 become infinite
            self.scores: np.ndarray = np.where(rows >= 0, scores, -np.inf).astype(np.float32)
        self.rows: np.ndarray = rows.astype(np.int32 if len(passages) < 2**31 else np.int64)
        if len(self._positions) < len(self.queries):
            twice = next(query for position, query in enumerate(self.queries) if self._positions[query] != position)
            raise InputError(f"run: expected each query once, found {twice} again")
        self._refuse_nan()
        self._order()
        self._refuse_duplicates()

    @classmethod
    def of(cls, run: Mapping[str, Mapping[str, float]]) -> RankedRun:
        """Convert a mapping of query id -> {passage id: score}; a RankedRun is returned unchanged."""
        if isinstance(run, RankedRun):
            return run
        table: dict[str, int] = {}
        rows = np.full((len(run), max(map(len, run.values()), default=0)), -1, np.int64)
        scores = np.full(rows.shape, -np.inf)
        for position, found in enumerate(run.values()):
            rows[position, : len(found)] = [table.setdefault(passage, len(table)) for passage in found]
            scores[position, : len(found)] = list(found.values())
        return cls(list(run), list(table), rows, scores)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {query: position for position, query in enumerate(self.queries)}

    def position(self, query: str) -> int | None:
        """The row of a query in `rows` and `scores`; None if the run lacks the query."""
        return self._positions.get(query)

    def __getitem__(self, query: str) -> dict[str, float]:
        position = self._positions[query]
        count = int((self.rows[position] >= 0).sum())
        rows, scores = self.rows[position, :count].tolist(), self.scores[position, :count].tolist()
        return {self.passages[row]: score for row, score in zip(rows, scores, strict=True)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def rows_of(self, wanted: set[str] | frozenset[str]) -> dict[str, int]:
        """Passage id -> row for the `wanted` ids in `passages`; cached, so it may contain other ids as well."""
        if not wanted <= self._cached_ids:
            self.cache_rows(wanted, rows_of(self.passages, wanted))
        return self._cached_rows

    def cache_rows(self, ids: set[str] | frozenset[str], found: dict[str, int]) -> None:
        """Cache the result of `rows_of(passages, ids)`, which scans all passages."""
        self._cached_ids, self._cached_rows = frozenset(ids), found

    def without(self, own: np.ndarray, k: int | None = None) -> RankedRun:
        """Remove passage row `own[q]` from query q (int [Q], -1 for none) and cut the run to depth `k`.

        `left_out` of the result counts the removed passages at any rank.
        """
        dropped = (self.rows == own[:, None]) & (own[:, None] >= 0)
        rows, scores = self.rows, self.scores
        if dropped.any():
            # A stable sort moves the remaining passages up in their order.
            order = np.argsort(dropped, axis=1, kind="stable")
            rows = np.where(np.take_along_axis(dropped, order, 1), -1, np.take_along_axis(rows, order, 1))
            scores = np.take_along_axis(scores, order, 1)
        run = RankedRun(self.queries, self.passages, rows[:, :k], scores[:, :k])
        run.cache_rows(self._cached_ids, self._cached_rows)
        run.left_out = self.left_out + int(dropped.sum())
        return run

    @property
    def depth(self) -> int:
        """The largest number of passages of any query."""
        return int((self.rows >= 0).sum(axis=1).max(initial=0))

    def cut(self, k: int) -> RankedRun:
        """The top `k` passages of each query; the run itself if it is not deeper."""
        if self.rows.shape[1] <= k:
            return self
        run = RankedRun(self.queries, self.passages, self.rows[:, :k], self.scores[:, :k])
        run.cache_rows(self._cached_ids, self._cached_rows)
        run.left_out = self.left_out
        return run

    def _refuse_nan(self) -> None:
        wrong = np.argwhere(np.isnan(self.scores))
        if len(wrong):
            query, position = wrong[0]
            passage = self.passages[self.rows[query, position]]
            raise InputError(
                f"run: expected a number as the score of query {self.queries[query]}, passage {passage}, found NaN"
            )

    def _order(self) -> None:
        rows, scores = self.rows, self.scores
        filled = rows >= 0
        if (scores[:, 1:] > scores[:, :-1]).any() or (filled[:, 1:] & ~filled[:, :-1]).any():
            # Empty entries become NaN, which sorts behind -inf.
            order = np.argsort(np.where(filled, -scores, np.nan), axis=1, kind="stable")
            self.rows = rows = np.take_along_axis(rows, order, 1)
            self.scores = scores = np.take_along_axis(scores, order, 1)
        order_ties(scores, rows, self.passages)

    def _refuse_duplicates(self) -> None:
        ordered = np.sort(self.rows, axis=1)
        twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        if len(twice):
            query, position = twice[0]
            passage = self.passages[ordered[query, position]]
            raise InputError(
                f"run: expected each passage once per query, found {passage} again for query {self.queries[query]}"
            )


def trec_order(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Sort the passages of one query in trec_eval's order: by float32 score, then as in index/ties.py."""
    ids = list(scores)
    with np.errstate(over="ignore"):
        rounded = np.fromiter(scores.values(), dtype=np.float64, count=len(ids)).astype(np.float32)
    return [(ids[row], scores[ids[row]]) for row in best_first(rounded, id_ranks(ids)).tolist()]


def identical_id_rows(
    queries: Iterable[str], row_of: Mapping[str, int], qrels: Mapping[str, Mapping[str, int]]
) -> np.ndarray:
    """Rows of the passages that have their query's id and are not judged for it, int64 [Q]; -1 if there is none.

    BEIR removes such passages from rankings: in ArguAna queries are passages of the corpus and would retrieve
    themselves. A judged pair of equal ids is kept, because queries and passages may be numbered independently.
    """
    rows = [-1 if query in qrels.get(query, ()) else row_of.get(query, -1) for query in queries]
    return np.array(rows, dtype=np.int64)


def without_identical_ids(run: RankedRun, qrels: Mapping[str, Mapping[str, int]], k: int | None = None) -> RankedRun:
    """Remove unjudged passages that have their query's id, and cut the run to depth `k`."""
    return run.without(identical_id_rows(run.queries, run.rows_of(frozenset(run.queries)), qrels), k)


def rows_of(passages: Sequence[str], wanted: set[str] | frozenset[str]) -> dict[str, int]:
    """Passage id -> row for the `wanted` ids; scans `passages` once without building an index of all of them."""
    return {passage: row for row, passage in enumerate(passages) if passage in wanted}
