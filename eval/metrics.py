"""nDCG, MAP, recall, precision, MRR, capped recall and success at k, equal to trec_eval's values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.ranking import RankedRun, Run, identical_id_rows, trec_order
from index.beir import Qrels
from index.files import InputError

__all__ = ["KS", "MEASURES", "Metrics", "PerQuery", "Qrels", "Run", "drop_identical_ids", "evaluate_run", "trec_order"]

KS = (1, 3, 5, 10, 100, 1000)

MEASURES = ("ndcg", "map", "recall", "precision", "mrr", "rcap", "success")

# Queries per batch; several arrays of their rankings are in memory at once.
QUERY_BATCH = 1024


class PerQuery(Mapping[str, dict[str, float]]):
    """A mapping of query id -> measure -> value, stored as one array.

    Args:
        queries: the Q query ids, in the order of the qrels.
        measures: the names of the C columns, such as "ndcg@10".
        values: float64 [Q, C].
    """

    def __init__(self, queries: Sequence[str], measures: Sequence[str], values: np.ndarray) -> None:
        self.queries = list(queries)
        self.measures = list(measures)
        self.values_array = values
        self._positions = {query: position for position, query in enumerate(self.queries)}

    def column(self, measure: str) -> np.ndarray:
        """The values of one measure, float64 [Q]."""
        return self.values_array[:, self.measures.index(measure)]

    def __getitem__(self, query: str) -> dict[str, float]:
        return dict(zip(self.measures, self.values_array[self._positions[query]].tolist(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run. Keys are "ndcg@10", "map@100", "recall@100", "precision@10", "mrr@10", "rcap@100",
    "success@5", …; values are in [0, 1]."""

    mean: dict[str, float]
    """Mean of each measure over every query of the qrels."""
    per_query: Mapping[str, dict[str, float]]
    """Query id -> measure -> value, in the order of the qrels; `evaluate_run` returns a PerQuery."""
    missing: list[str]
    """Judged queries without results in the run; each counts as 0 in the mean."""
    identical_ids_left_out: int = 0
    """Number of passages removed from the run because they have their query's id and the pair is not judged."""
    depth: int | None = None
    """Largest number of passages that the run ranks for a judged query; recall does not grow beyond this cut-off.
    None if it is not known."""


def drop_identical_ids(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]] | None = None
) -> Run:
    """Remove passages whose id equals their query's id, unless the qrels judge the pair.

    BEIR also removes judged pairs. The rule matters for ArguAna, whose queries are passages of the corpus.
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
    """Compute the metrics of a run against qrels.

    The values equal those of trec_eval with its option -c (Buckley; https://github.com/usnistgov/trec_eval). Ties are
    broken by passage id, descending. Scores are compared as float32. Unjudged passages and grades below 1 are not
    relevant. The mean is over all queries of the qrels; a query without results or without a relevant passage counts
    as 0. The `beir` package agrees if the run has every query.

    nDCG@k uses the grade as gain and the discount 1/log2(rank + 1) (Järvelin and Kekäläinen 2002; trec_eval's
    ndcg_cut). MRR@k is the reciprocal rank of the first relevant passage in the top k, or 0. rcap@k is BEIR's capped
    recall, which divides by the smaller of k and the number of relevant passages. success@k is 1 if the top k contain
    a relevant passage.

    Args:
        qrels: query id -> passage id -> grade; not empty.
        run: query id -> passage id -> score; queries without judgements are ignored. A RankedRun needs the least
            memory.
        ks: cut-offs, each at least 1.
        drop_identical: first remove passages whose id equals the query's id, unless the qrels judge the pair (BEIR's
            rule; trec_eval removes none).

    Raises:
        ValueError: `ks` is empty or contains a number below 1.
        InputError: the qrels are empty, or a score is NaN.
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
    positions = np.array([-1 if (position := ranked.position(query)) is None else position for query in qrels])
    # One more than the deepest cut-off, in case an identical id is removed.
    width = cuts[-1] + 1
    depth = 0
    left_out = ranked.left_out
    for start in range(0, len(qrels), QUERY_BATCH):
        part = slice(start, start + QUERY_BATCH)
        rows = np.where(positions[part, None] >= 0, ranked.rows[positions[part]], -1) if len(ranked) else None
        if rows is None or not rows.size:
            break
        counts = (rows >= 0).sum(axis=1)
        if drop_identical:
            dropped = (rows == judged.identical_id_rows[part, None]) & (rows >= 0)
            left_out += int(dropped.sum())
            counts -= dropped.sum(axis=1)
            rows = _drop(rows[:, :width], dropped[:, :width])
        rows = rows[:, :width]
        depth = max(depth, int(counts.max()))
        answered[part] = (rows >= 0).any(axis=1)
        values[part] = np.hstack(_measures(judged.grades(part, rows), judged.counts[part], judged.ideal(part), cuts))
    mean = {name: math.fsum(column) / len(qrels) for name, column in zip(names, values.T.tolist(), strict=True)}
    missing = [query for query, found in zip(qrels, answered.tolist(), strict=True) if not found]
    return Metrics(mean, PerQuery(list(qrels), names, values), missing, left_out, depth)


class _Judgements:
    """The qrels as arrays indexed by the passage rows of a run."""

    def __init__(self, qrels: Qrels, run: RankedRun) -> None:
        wanted = {passage for grades in qrels.values() for passage in grades}
        row_of = run.rows_of(wanted | qrels.keys())
        self.identical_id_rows = identical_id_rows(qrels, row_of, qrels)
        """int64 [Q]: the row of the unjudged passage with the query's id; -1 if there is none."""
        positive = [
            sorted((grade for grade in grades.values() if grade > 0), reverse=True) for grades in qrels.values()
        ]
        self._positive = positive
        self.counts = np.array(list(map(len, positive)), dtype=np.int64)
        """int64 [Q]: number of relevant passages, retrieved or not."""
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
        """Grades [n, K] of the ranked `rows` [n, K] of the queries `part`; 0 if not relevant."""
        if not len(self._keys):
            return np.zeros(rows.shape, dtype=np.int64)
        queries = np.arange(part.start, part.start + len(rows), dtype=np.int64)[:, None]
        keys = queries * self._width + rows
        positions = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where((self._keys[positions] == keys) & (rows >= 0), self._grades[positions], 0)

    def ideal(self, part: slice) -> np.ndarray:
        """Positive grades of the queries `part` in descending order, padded with 0: [n, R]."""
        positive = self._positive[part]
        ideal = np.zeros((len(positive), max(1, *map(len, positive))))
        for row, grades in zip(ideal, positive, strict=True):
            row[: len(grades)] = grades
        return ideal


def _drop(rows: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Remove the entries `dropped` (bool [n, K]) from `rows` [n, K] and shift later entries up, in place."""
    for query in np.flatnonzero(dropped.any(axis=1)):
        kept = rows[query][~dropped[query]]
        rows[query, : len(kept)], rows[query, len(kept) :] = kept, -1
    return rows


def _measures(grades: np.ndarray, relevant: np.ndarray, ideal: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """Values of MEASURES, [n, cuts] each, from ranked grades [n, K], relevant counts [n] and ideal grades [n, R]."""
    ranks = np.arange(1, grades.shape[1] + 1)
    is_relevant = grades > 0
    hits = is_relevant.cumsum(axis=1)
    # cumsum adds in rank order, as trec_eval does, so the sums are bitwise equal.
    gain = (grades / _discounts(grades.shape[1])).cumsum(axis=1)
    best = (ideal / _discounts(ideal.shape[1])).cumsum(axis=1)
    precision_sums = np.where(is_relevant, hits / ranks, 0.0).cumsum(axis=1)
    first_rank = np.where(is_relevant.any(axis=1), is_relevant.argmax(axis=1) + 1, 0)[:, None]
    cutoffs = np.array(cuts)
    found, total = _at_cutoffs(hits, cuts), relevant[:, None]
    return [
        _ratio(_at_cutoffs(gain, cuts), _at_cutoffs(best, cuts)),
        _ratio(_at_cutoffs(precision_sums, cuts), total),
        _ratio(found, total),
        found / cutoffs,
        np.where((first_rank > 0) & (first_rank <= cutoffs), _ratio(np.ones_like(first_rank), first_rank), 0.0),
        _ratio(found, np.minimum(total, cutoffs)),
        (found > 0).astype(np.float64),
    ]


def _discounts(depth: int) -> np.ndarray:
    # math.log2 is the C library's, as in trec_eval; numpy's may differ in the last bit.
    return np.array([math.log2(rank + 1) for rank in range(1, depth + 1)])


def _at_cutoffs(sums: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """Columns of cumulative sums [n, K] at the cut-offs; cut-offs beyond K take the last column."""
    return sums[:, [min(k, sums.shape[1]) - 1 for k in cuts]]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where `whole` is 0."""
    ratio = np.zeros(np.broadcast_shapes(part.shape, whole.shape))
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio
