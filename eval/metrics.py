"""nDCG, MAP, recall, precision, MRR, capped recall and success at k: trec_eval's numbers, from arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.ranking import RankedRun, Run, own_rows, trec_order
from index.beir import Qrels
from index.files import InputError

__all__ = ["KS", "MEASURES", "Metrics", "PerQuery", "Qrels", "Run", "drop_identical_ids", "evaluate_run", "trec_order"]

KS = (1, 3, 5, 10, 100, 1000)

MEASURES = ("ndcg", "map", "recall", "precision", "mrr", "rcap", "success")

# Queries scored at a time: some arrays of that many rankings are held at once.
QUERIES_AT_ONCE = 1024


class PerQuery(Mapping[str, dict[str, float]]):
    """Query id -> measure -> value, kept as one array.

    `queries` are its rows, in the order of the qrels; `measures` its columns; `values` float64 [queries, measures].
    """

    def __init__(self, queries: Sequence[str], measures: Sequence[str], values: np.ndarray) -> None:
        self.queries = list(queries)
        self.measures = list(measures)
        self.values_array = values
        self._places = {query: place for place, query in enumerate(self.queries)}

    def column(self, measure: str) -> np.ndarray:
        """One measure's value for every query, float64 [queries]."""
        return self.values_array[:, self.measures.index(measure)]

    def __getitem__(self, query: str) -> dict[str, float]:
        return dict(zip(self.measures, self.values_array[self._places[query]].tolist(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Metrics:
    """What a run scored. Keys are "ndcg@10", "map@100", "recall@100", "precision@10", "mrr@10", "rcap@100",
    "success@5", …; values in [0, 1]."""

    mean: dict[str, float]
    """Mean of each measure over every query of the qrels."""
    per_query: Mapping[str, dict[str, float]]
    """Query id -> measure -> value, in the order of the qrels; a PerQuery where evaluate_run made it."""
    missing: list[str]
    """Queries of the qrels for which the run has nothing; each counts as 0 in the mean."""
    identical_ids_left_out: int = 0
    """Passages that were left out of the run because they have their query's id and no judgement names the pair."""


def drop_identical_ids(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]] | None = None
) -> Run:
    """The run without passages whose id is their query's own id, unless the qrels judge the pair.

    BEIR leaves them out too (it matters for ArguAna), but judged ones as well.
    """
    judged = qrels or {}
    return {
        query: {
            passage: score for passage, score in scores.items() if passage != query or query in judged.get(query, ())
        }
        for query, scores in run.items()
    }


def evaluate_run(
    qrels: Qrels, run: Mapping[str, Mapping[str, float]], ks: Sequence[int] = KS, *, drop_identical: bool = True
) -> Metrics:
    """Score a run.

    The numbers are trec_eval's with its option -c (Buckley; https://github.com/usnistgov/trec_eval): ties go by
    passage id, descending, scores are compared as float32, unjudged passages and grades below 1 count as not relevant,
    and the mean is over every query of the qrels, so that a query the run misses, or one without a relevant passage,
    counts as 0. nDCG takes the grade as gain and 1/log2(rank + 1) as discount (Järvelin and Kekäläinen 2002, as
    trec_eval's ndcg_cut). MRR@k is the reciprocal rank of the first relevant passage within the first k, else 0.
    rcap@k, BEIR's capped recall, divides by the smaller of k and the number of relevant passages. success@k is 1 when
    a relevant passage is within the first k. The `beir` package agrees wherever the run has every query.

    Args:
        qrels: the judgements; not empty.
        run: the ranked passages; queries that the qrels lack are ignored. A RankedRun is scored in little memory.
        ks: cut-offs, each at least 1.
        drop_identical: first drop passages whose id is the query's id, as BEIR does, unless the qrels judge the pair.
            trec_eval drops none.

    Raises:
        ValueError: `ks` is empty or holds a number below 1.
        InputError: the qrels are empty, or a score is not a number.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, found {list(ks)}")
    if not qrels:
        raise InputError("qrels: expected at least one judged query, found none")
    ranked = RankedRun.of(run)
    judged = _Judgements(qrels, ranked)
    cuts = sorted(set(ks))
    names = [f"{measure}@{k}" for measure in MEASURES for k in cuts]
    values = np.zeros((len(qrels), len(names)))
    answered = np.zeros(len(qrels), dtype=bool)
    places = np.array([-1 if (place := ranked.place(query)) is None else place for query in qrels])
    # One more than the deepest cut-off, for a passage that is its own query.
    depth = cuts[-1] + 1
    left_out = ranked.left_out
    for start in range(0, len(qrels), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        rows = np.where(places[part, None] >= 0, ranked.rows[places[part]], -1) if len(ranked) else None
        if rows is None or not rows.size:
            break
        if drop_identical:
            dropped = (rows == judged.own_rows[part, None]) & (rows >= 0)
            left_out += int(dropped.sum())
            rows = _without(rows[:, :depth], dropped[:, :depth])
        rows = rows[:, :depth]
        answered[part] = (rows >= 0).any(axis=1)
        values[part] = np.hstack(_measures(judged.grades(part, rows), judged.counts[part], judged.ideal(part), cuts))
    mean = {name: math.fsum(column) / len(qrels) for name, column in zip(names, values.T.tolist(), strict=True)}
    missing = [query for query, found in zip(qrels, answered.tolist(), strict=True) if not found]
    return Metrics(mean, PerQuery(list(qrels), names, values), missing, left_out)


class _Judgements:
    """The qrels as arrays over the rows of a run's passages."""

    def __init__(self, qrels: Qrels, run: RankedRun) -> None:
        wanted = {passage for grades in qrels.values() for passage in grades}
        row_of = run.rows_of(wanted | qrels.keys())
        self.own_rows = own_rows(qrels, row_of, qrels)
        """[Q]: the row of the unjudged passage that has the query's own id; -1 without one."""
        positive = [
            sorted((grade for grade in grades.values() if grade > 0), reverse=True) for grades in qrels.values()
        ]
        self._positive = positive
        self.counts = np.array(list(map(len, positive)), dtype=np.int64)
        """[Q]: relevant passages, those that the run lacks included."""
        self._width = max(1, len(run.passages))
        found = [
            (query * self._width + row_of[passage], grade)
            for query, grades in enumerate(qrels.values())
            for passage, grade in grades.items()
            if grade > 0 and passage in row_of
        ]
        pairs = np.array(sorted(found), dtype=np.int64).reshape(-1, 2)
        self._keys, self._grades = pairs[:, 0], pairs[:, 1]

    def grades(self, part: slice, rows: np.ndarray) -> np.ndarray:
        """The grades of ranked `rows` [n, K] of the queries `part`; 0 for what is not relevant."""
        if not len(self._keys):
            return np.zeros(rows.shape, dtype=np.int64)
        queries = np.arange(part.start, part.start + len(rows), dtype=np.int64)[:, None]
        keys = queries * self._width + rows
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where((self._keys[places] == keys) & (rows >= 0), self._grades[places], 0)

    def ideal(self, part: slice) -> np.ndarray:
        """The positive grades of the queries `part`, best first, filled up with 0: [n, R]."""
        positive = self._positive[part]
        ideal = np.zeros((len(positive), max(1, *map(len, positive))))
        for row, grades in zip(ideal, positive, strict=True):
            row[: len(grades)] = grades
        return ideal


def _without(rows: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """`rows` [n, K] without those `dropped` (bool [n, K]); what stands behind them moves up."""
    for query in np.flatnonzero(dropped.any(axis=1)):
        kept = rows[query][~dropped[query]]
        rows[query, : len(kept)], rows[query, len(kept) :] = kept, -1
    return rows


def _measures(grades: np.ndarray, relevant: np.ndarray, ideal: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """The values of MEASURES, each [n, cuts], from ranked grades [n, K], relevant passages [n], ideal grades [n, R]."""
    ranks = np.arange(1, grades.shape[1] + 1)
    hit = grades > 0
    hits = hit.cumsum(axis=1)
    # cumsum adds one rank after the other, as trec_eval does: the sums have the same bits.
    gain = (grades / _discounts(grades.shape[1])).cumsum(axis=1)
    best = (ideal / _discounts(ideal.shape[1])).cumsum(axis=1)
    precise = np.where(hit, hits / ranks, 0.0).cumsum(axis=1)
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)[:, None]
    wide = np.array(cuts)
    found, total = _at(hits, cuts), relevant[:, None]
    return [
        _ratio(_at(gain, cuts), _at(best, cuts)),
        _ratio(_at(precise, cuts), total),
        _ratio(found, total),
        found / wide,
        np.where((first > 0) & (first <= wide), _ratio(np.ones_like(first), first), 0.0),
        _ratio(found, np.minimum(total, wide)),
        (found > 0).astype(np.float64),
    ]


def _discounts(depth: int) -> np.ndarray:
    # The C library's log2, because trec_eval's is; numpy's own may differ in the last bit.
    return np.array([math.log2(rank + 1) for rank in range(1, depth + 1)])


def _at(sums: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """Columns of running sums [n, K] at the cut-offs; a ranking that is shorter stays at its last."""
    return sums[:, [min(k, sums.shape[1]) - 1 for k in cuts]]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)
