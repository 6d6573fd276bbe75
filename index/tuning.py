"""The cheapest search settings of an index that meet a recall target, found by measuring against exact search.

Recall@k of a query is the share of its k exact nearest passages that are found; a passage tied with the k-th counts as
one of them. A setting meets the target when the lower end of a one-sided 95 % interval for the mean recall (Student's
t over the queries) reaches it, so that other queries of the same kind may be expected to meet it too.

Recall rises with every setting, and so does the work. With one setting (nprobe, or efSearch) the cheapest that meets
the target is therefore the least, and is found by doubling and bisection, without a clock: the answer does not depend
on how busy the machine is. A refining index has two, which trade for each other: for every k_factor the least nprobe
is found the same way, and only those few pairs are timed, in turns, each by its fastest round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from index import exact
from index.factory import import_faiss
from index.files import InputError
from index.row_names import RowNames
from index.settings import Settings, core, parts
from index.store import EmbeddingStore
from index.training import read_rows, sample_rows

CONFIDENCE = 0.95
# Fewer tell too little about the mean for an interval by Student's t.
LEAST_QUERIES = 30
K_FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
# A setting is found to this share of itself, and times closer than this count as equal.
RESOLUTION = 0.02
ROUNDS = 3
# Exact neighbours beyond k that are looked at for ties with the k-th.
SPARE = 16
# Inner products of float32 differ by about this share between one way of summing and another.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Target:
    """A promise to keep: recall@k of at least `recall`."""

    recall: float
    k: int = 10
    queries: np.ndarray | None = None
    """Vectors [Q, D] float32 of real queries; none takes passages, whose own rows then do not count."""
    held_out: int = 2000
    """How many passages, where there are no queries."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise InputError(f"--target-recall: expected more than 0 and at most 1, found {self.recall}")
        if self.k < 1:
            raise InputError(f"--k: expected at least 1, found {self.k}")
        if self.queries is not None and len(self.queries) < LEAST_QUERIES:
            raise InputError(f"--queries: expected at least {LEAST_QUERIES} to measure by, found {len(self.queries)}")

    def held_out_rows(self, rows: int, seed: int) -> np.ndarray:
        """The rows of a store that serve as queries: none where there are real ones."""
        if self.queries is not None:
            return np.empty(0, np.int64)
        if rows < LEAST_QUERIES + 1:
            raise InputError(f"--target-recall: expected more than {LEAST_QUERIES} passages, found {rows}")
        # Another seed than the training sample's: its first rows would be these.
        return sample_rows(rows, min(self.held_out, rows // 2 + 1), seed ^ 0x5EED)


@dataclass(frozen=True)
class Truth:
    """Queries and what exact search finds for them."""

    queries: np.ndarray
    """[Q, D] float32."""
    own: np.ndarray | None
    """[Q] the queries' own rows, which do not count; none for real queries."""
    rows: np.ndarray
    """[Q, n] the k nearest and those tied with the k-th; -1 where there are no more."""
    k: int


@dataclass(frozen=True)
class Point:
    """One setting, measured."""

    settings: Settings
    recall: float
    """The mean over the queries."""
    at_least: float
    """The lower end of its interval."""
    microseconds: float
    """A query, in a batch of all of them, on `Tuning.threads` threads."""
    compared: float
    """Codes compared with a query, where faiss counts them: a cost that no other work on the machine can change."""

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **self.settings.known(),
            "recall": round(self.recall, 6),
            "at_least": round(self.at_least, 6),
            "microseconds": round(self.microseconds, 2),
            "compared": round(self.compared, 1),
        }


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what was chosen."""

    target: Target
    chosen: Point
    curve: list[Point]
    """Every setting measured, by time."""
    queries: int
    threads: int

    @property
    def met(self) -> bool:
        """Whether the chosen setting meets the target."""
        return self.chosen.at_least >= self.target.recall

    def line(self) -> str:
        """What came of it, for a person."""
        measured = f"recall@{self.target.k} {self.chosen.recall:.4f}, at least {self.chosen.at_least:.4f}"
        cost = f"{self.chosen.microseconds:,.0f} µs a query on {self.threads} threads"
        if self.met:
            return f"recall target {self.target.recall:g} met by {self.chosen.settings}: {measured}; {cost}"
        return (
            f"recall target {self.target.recall:g} NOT met: the best that these codes reach is {measured}, by "
            f"{self.chosen.settings}; take a finer code (SQ8, Flat) or add a refinement (…,RFlat)"
        )

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "target_recall": self.target.recall,
            "k": self.target.k,
            "met": self.met,
            "queries": self.queries,
            "queries_from": "passages held out" if self.target.queries is None else "queries",
            "confidence": CONFIDENCE,
            "threads": self.threads,
            "chosen": self.chosen.as_json(),
            "curve": [point.as_json() for point in self.curve],
        }


def find_truth(store: EmbeddingStore, target: Target, held_out: np.ndarray) -> Truth:
    """Search the store exactly, for the target's queries or for the vectors of its rows `held_out`.

    Raises:
        InputError: the queries have another dimension than the store.
    """
    own = None
    if target.queries is not None:
        queries = np.ascontiguousarray(target.queries, np.float32)
        if queries.shape[1] != store.dim:
            raise InputError(f"--queries: expected vectors of {store.dim} dimensions, found {queries.shape[1]}")
    else:
        own, queries = held_out, read_rows(store, held_out)
    scores, rows = exact.search(queries, store.shards(), RowNames(store.rows), target.k + SPARE + 1)
    if own is not None:
        scores, rows = _without_own(scores, rows, own)
    last = scores[:, min(target.k, scores.shape[1]) - 1, None]
    rows = np.where(scores >= last - ROUNDING * np.abs(last), rows, -1)
    return Truth(queries, own, rows, min(target.k, rows.shape[1]))


def tune(index: Any, truth: Truth, target: Target, progress: Callable[[str], None] | None = None) -> Tuning:
    """Find the cheapest settings of `index` that meet `target`, or the best there are, and apply them.

    Args:
        index: filled, of the rows that `truth` is about.
        truth: from `find_truth`.
        target: the promise.
        progress: called with each setting and its recall.
    """
    search = _Search(index, truth, target.recall, progress)
    refines = any(isinstance(part, import_faiss().IndexRefine) for part in parts(index))
    found = search.least_pairs() if refines else [search.least(None, 1, search.limit)]
    met = [point for point in found if point is not None]
    points = list(search.measured.values())
    if met:
        times = _times(index, truth, [point.settings for point in met])
        fastest = min(times)
        chosen, microseconds = next(
            (point, spent) for point, spent in zip(met, times, strict=True) if spent <= fastest * (1 + RESOLUTION)
        )
    else:
        chosen = max(points, key=lambda point: (point.at_least, -point.compared))
        (microseconds,) = _times(index, truth, [chosen.settings])
    chosen = replace(chosen, microseconds=microseconds)
    points = [chosen if point.settings == chosen.settings else point for point in points]
    chosen.settings.apply(index)
    curve = sorted(points, key=lambda point: point.microseconds)
    return Tuning(target, chosen, curve, len(truth.queries), import_faiss().omp_get_max_threads())


def measure(index: Any, truth: Truth, settings: Settings) -> Point:
    """Recall and time of `index` with `settings`, which stay applied."""
    faiss = import_faiss()
    settings.apply(index)
    faiss.cvar.indexIVF_stats.reset()
    faiss.cvar.hnsw_stats.reset()
    started = time.perf_counter()
    found = _found(index, truth)
    seconds = time.perf_counter() - started
    inner = core(index)
    counted = faiss.cvar.hnsw_stats if isinstance(inner, faiss.IndexHNSW) else faiss.cvar.indexIVF_stats
    compared = counted.ndis if isinstance(inner, faiss.IndexHNSW | faiss.IndexIVF) else index.ntotal * len(found)
    recalls = recall_of_each(found, truth)
    mean = float(recalls.mean())
    each = 1 / len(found)
    return Point(settings, mean, _lower_end(recalls), 1e6 * seconds * each, float(compared) * each)


def recall_of_each(found: np.ndarray, truth: Truth) -> np.ndarray:
    """The recall [Q] float64 of the rows found [Q, k], -1 for none."""
    hits = np.empty(len(found), np.int64)
    # So many at once that their comparisons take 16 MiB.
    some = max(1, 2**24 // (found.shape[1] * truth.rows.shape[1]))
    for start in range(0, len(found), some):
        ours, theirs = found[start : start + some, :, None], truth.rows[start : start + some, None, :]
        hits[start : start + some] = ((ours == theirs) & (ours >= 0)).any(axis=2).sum(axis=1)
    return np.minimum(hits, truth.k) / truth.k


def _found(index: Any, truth: Truth) -> np.ndarray:
    """The k rows that `index` finds for each query."""
    if truth.own is None:
        return index.search(truth.queries, truth.k)[1]
    scores, rows = index.search(truth.queries, truth.k + 1)
    return _without_own(scores, rows, truth.own)[1]


def _without_own(scores: np.ndarray, rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave `own` [Q] out of each query's `rows` [Q, n]; where it is not among them, the last goes."""
    width = rows.shape[1]
    own_place = rows == own[:, None]
    own_place[~own_place.any(axis=1), width - 1] = True
    kept = ~own_place
    return scores[kept].reshape(-1, width - 1), rows[kept].reshape(-1, width - 1)


def _lower_end(recalls: np.ndarray) -> float:
    """The lower end of the one-sided interval for the mean of `recalls` [Q] (Student's t)."""
    from scipy import stats

    error = recalls.std(ddof=1) / np.sqrt(len(recalls))
    return float(recalls.mean() - stats.t.ppf(CONFIDENCE, len(recalls) - 1) * error)


def _times(index: Any, truth: Truth, settings: list[Settings]) -> list[float]:
    """Microseconds a query of each setting: its fastest round of several, in turns, which other work disturbs least."""
    best = [np.inf] * len(settings)
    for _ in range(ROUNDS):
        for place, each in enumerate(settings):
            each.apply(index)
            started = time.perf_counter()
            _found(index, truth)
            best[place] = min(best[place], time.perf_counter() - started)
    return [1e6 * seconds / len(truth.queries) for seconds in best]


class _Search:
    """Looks for the least settings that meet a target, and keeps all that it measures on the way."""

    def __init__(self, index: Any, truth: Truth, recall: float, progress: Callable[[str], None] | None) -> None:
        faiss = import_faiss()
        self._index = index
        self._truth = truth
        self._recall = recall
        self._progress = progress
        inner = core(index)
        self._kind = "nprobe" if isinstance(inner, faiss.IndexIVF) else "ef_search"
        # The largest value of the one setting that costs something; 0 where there is none.
        self.limit = 0
        if isinstance(inner, faiss.IndexIVF):
            self.limit = int(inner.nlist)
        elif isinstance(inner, faiss.IndexHNSW):
            self.limit = int(min(max(index.ntotal, 1), 8192))
        self.measured: dict[Settings, Point] = {}

    def at(self, value: int, k_factor: float | None) -> Point:
        """The setting's measurement, made at most once."""
        settings = Settings(k_factor=k_factor)
        if self.limit:
            settings = replace(settings, **{self._kind: value})
        if settings not in self.measured:
            self.measured[settings] = point = measure(self._index, self._truth, settings)
            if self._progress is not None:
                self._progress(f"{settings}: recall {point.recall:.4f}")
        return self.measured[settings]

    def meets(self, point: Point) -> bool:
        return point.at_least >= self._recall

    def least(self, k_factor: float | None, low: int, high: int) -> Point | None:
        """The least value from `low` to `high` that meets the target; None when none does."""
        failed, value, recall, gain = low - 1, max(1, low), 0.0, np.inf
        while not self.meets(point := self.at(value, k_factor)):
            before, gain, recall = gain, point.recall - recall, point.recall
            # Doublings gain less and less: when this one's gain at each of those left is too little, so are they.
            doublings = np.ceil(np.log2(high / value)) if high > value else 0
            if value >= high or (gain < before and recall + gain * doublings < self._recall):
                return None
            failed, value = value, min(2 * value, high)
        met = value
        while met - failed > max(1, RESOLUTION * met):
            middle = (met + failed) // 2
            if self.meets(self.at(middle, k_factor)):
                met = middle
            else:
                failed = middle
        self._look_beyond(met, k_factor)
        return self.at(met, k_factor)

    def least_pairs(self) -> list[Point | None]:
        """For every k_factor that lets the other setting be smaller, the least of it that meets the target."""
        found: list[Point | None] = []
        high = self.limit
        for k_factor in K_FACTORS:
            if k_factor > 1 and k_factor * self._truth.k > 2 * self._index.ntotal:
                break
            point = self.least(k_factor, 1, max(high, 1))
            if point is None:
                continue
            found.append(point)
            if not self.limit:
                break
            value = point.settings.known()[self._kind]
            if len(found) > 1 and value > high * (1 - RESOLUTION):
                break
            high = int(value)
        return found

    def _look_beyond(self, met: int, k_factor: float | None) -> None:
        """Measure a little past the target, so that the curve shows what more would cost."""
        for value in (met * 3 // 2, 2 * met, 4 * met):
            if k_factor is not None or value > self.limit or self.at(value, k_factor).recall > 0.999:
                break
