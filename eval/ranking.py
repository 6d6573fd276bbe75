"""A run as arrays: which passages each query found, best first, in trec_eval's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from index.files import InputError

Run = dict[str, dict[str, float]]
"""Query id -> passage id -> score; higher is better."""


class RankedRun(Mapping[str, dict[str, float]]):
    """The ranked passages of Q queries, at most K each, in 8 bytes a place (a dictionary takes about 100).

    Each query's passages stand in trec_eval's order: float32 score, descending, then id, descending in its UTF-8
    bytes (which compare as Python's text does). It reads like the dictionary of dictionaries that it stands for:
    `run[query]` makes that of one query, best first.

    Args:
        queries: ids of the Q queries.
        passages: the ids that `rows` points into; the corpus's, say.
        rows: int [Q, K]; -1, with any score, for a place that stays empty. In any order.
        scores: [Q, K] of any floating dtype, kept as float32.

    Raises:
        InputError: a score is not a number, or a query or a query's passage comes twice.
        ValueError: the shapes do not fit together.
    """

    def __init__(self, queries: Sequence[str], passages: Sequence[str], rows: np.ndarray, scores: np.ndarray) -> None:
        if rows.shape != scores.shape or rows.ndim != 2 or len(rows) != len(queries):
            raise ValueError(f"rows, scores: expected shape [{len(queries)}, K], found {rows.shape}, {scores.shape}")
        if rows.size and int(rows.max()) >= len(passages):
            raise ValueError(f"rows: expected rows of {len(passages)} passages, found {int(rows.max())}")
        self.queries = list(queries)
        self.passages = passages
        self.left_out = 0
        """How many passages `without` has left out."""
        self._sought: frozenset[str] = frozenset()
        self._found: dict[str, int] = {}
        with np.errstate(over="ignore"):  # as in trec_eval, what float32 cannot hold is infinite
            self.scores: np.ndarray = np.where(rows >= 0, scores, -np.inf).astype(np.float32)
        self.rows: np.ndarray = rows.astype(np.int32 if len(passages) < 2**31 else np.int64)
        if len(self._places) < len(self.queries):
            twice = next(query for place, query in enumerate(self.queries) if self._places[query] != place)
            raise InputError(f"run: expected each query once, found {twice} again")
        self._refuse_nan()
        self._order()
        self._refuse_duplicates()

    @classmethod
    def of(cls, run: Mapping[str, Mapping[str, float]]) -> RankedRun:
        """The run that a dictionary of dictionaries stands for; a RankedRun is given back as it is."""
        if isinstance(run, RankedRun):
            return run
        table: dict[str, int] = {}
        rows = np.full((len(run), max(map(len, run.values()), default=0)), -1, np.int64)
        scores = np.full(rows.shape, -np.inf)
        for place, found in enumerate(run.values()):
            rows[place, : len(found)] = [table.setdefault(passage, len(table)) for passage in found]
            scores[place, : len(found)] = list(found.values())
        return cls(list(run), list(table), rows, scores)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {query: place for place, query in enumerate(self.queries)}

    def place(self, query: str) -> int | None:
        """The query's row of `rows` and `scores`; none for a query that is not in the run."""
        return self._places.get(query)

    def __getitem__(self, query: str) -> dict[str, float]:
        place = self._places[query]
        count = int((self.rows[place] >= 0).sum())
        rows, scores = self.rows[place, :count].tolist(), self.scores[place, :count].tolist()
        return {self.passages[row]: score for row, score in zip(rows, scores, strict=True)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def rows_of(self, wanted: set[str] | frozenset[str]) -> dict[str, int]:
        """The rows of `passages` that hold those of the `wanted` ids that are there, perhaps with others."""
        if not wanted <= self._sought:
            self.remember(wanted, rows_of(self.passages, wanted))
        return self._found

    def remember(self, sought: set[str] | frozenset[str], found: dict[str, int]) -> None:
        """Keep what `rows_of(passages, sought)` has found, because it looks at every passage."""
        self._sought, self._found = frozenset(sought), found

    def without(self, own: np.ndarray, k: int | None = None) -> RankedRun:
        """The run without passage `own[q]` for query q (int [Q], -1 for none), cut to `k` places a query.

        Its `left_out` counts the passages that were left out, wherever they stood.
        """
        dropped = (self.rows == own[:, None]) & (own[:, None] >= 0)
        rows, scores = self.rows, self.scores
        if dropped.any():
            # Stable: what is left moves up and keeps its order.
            order = np.argsort(dropped, axis=1, kind="stable")
            rows = np.where(np.take_along_axis(dropped, order, 1), -1, np.take_along_axis(rows, order, 1))
            scores = np.take_along_axis(scores, order, 1)
        run = RankedRun(self.queries, self.passages, rows[:, :k], scores[:, :k])
        run.remember(self._sought, self._found)
        run.left_out = self.left_out + int(dropped.sum())
        return run

    @property
    def depth(self) -> int:
        """The most passages that a query has."""
        return int((self.rows >= 0).sum(axis=1).max(initial=0))

    def cut(self, k: int) -> RankedRun:
        """The first `k` passages of every query; the run itself where it is no deeper."""
        if self.rows.shape[1] <= k:
            return self
        run = RankedRun(self.queries, self.passages, self.rows[:, :k], self.scores[:, :k])
        run.remember(self._sought, self._found)
        run.left_out = self.left_out
        return run

    def _refuse_nan(self) -> None:
        wrong = np.argwhere(np.isnan(self.scores))
        if len(wrong):
            query, place = wrong[0]
            passage = self.passages[self.rows[query, place]]
            raise InputError(
                f"run: expected a number as the score of query {self.queries[query]}, passage {passage}, found NaN"
            )

    def _order(self) -> None:
        rows, scores = self.rows, self.scores
        filled = rows >= 0
        if (scores[:, 1:] > scores[:, :-1]).any() or (filled[:, 1:] & ~filled[:, :-1]).any():
            # NaN sorts last, behind -inf: empty places.
            order = np.argsort(np.where(filled, -scores, np.nan), axis=1, kind="stable")
            self.rows = rows = np.take_along_axis(rows, order, 1)
            self.scores = scores = np.take_along_axis(scores, order, 1)
        tied = (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)
        for query in np.flatnonzero(tied.any(axis=1)):
            edges = np.flatnonzero(np.diff(tied[query], prepend=False, append=False))
            for first, last in edges.reshape(-1, 2).tolist():
                group = rows[query, first : last + 1]
                group[:] = sorted(group.tolist(), key=self.passages.__getitem__, reverse=True)

    def _refuse_duplicates(self) -> None:
        ordered = np.sort(self.rows, axis=1)
        twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
        if len(twice):
            query, place = twice[0]
            passage = self.passages[ordered[query, place]]
            raise InputError(
                f"run: expected each passage once a query, found {passage} again for query {self.queries[query]}"
            )


def trec_order(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """(passage id, score) pairs in trec_eval's order: float32 score descending, then id descending."""
    ids = list(scores)
    with np.errstate(over="ignore"):
        rounded = np.fromiter(scores.values(), dtype=np.float64, count=len(ids)).astype(np.float32).tolist()
    return [(passage, scores[passage]) for _, passage in sorted(zip(rounded, ids, strict=True), reverse=True)]


def own_rows(queries: Iterable[str], row_of: Mapping[str, int], qrels: Mapping[str, Mapping[str, int]]) -> np.ndarray:
    """The row of the passage that has its query's id, where the qrels do not judge the pair; else -1: int64 [Q].

    BEIR leaves such passages out of rankings: in ArguAna a query is a passage of the corpus, and would find itself.
    Where ids are numbers of their own on both sides, a judged pair of equal ids is a pair like any other and counts.
    """
    rows = [-1 if query in qrels.get(query, ()) else row_of.get(query, -1) for query in queries]
    return np.array(rows, dtype=np.int64)


def without_identical_ids(run: RankedRun, qrels: Mapping[str, Mapping[str, int]], k: int | None = None) -> RankedRun:
    """The run without `own_rows`, cut to `k` places a query."""
    return run.without(own_rows(run.queries, run.rows_of(frozenset(run.queries)), qrels), k)


def rows_of(passages: Sequence[str], wanted: set[str] | frozenset[str]) -> dict[str, int]:
    """The rows of those `wanted` that are among `passages`: one look at each, and no table of them all."""
    return {passage: row for row, passage in enumerate(passages) if passage in wanted}
