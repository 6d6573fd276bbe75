"""The cheapest search settings of an index that meet a recall target, found by measuring against exact search.

Recall rises with every setting, and so does the work. With one setting (nprobe, or efSearch) the cheapest that meets
the target is therefore the least, and is found by doubling and bisection, without a clock: the answer does not depend
on how busy the machine is. A refining index has two, which trade for each other: for every k_factor the least nprobe
is found the same way, and only those few pairs are timed: in turns, on one thread, by the processor time of each one's
fastest round, which other work on the machine disturbs far less than the time on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import Settings, core, parts
from index.ann.tuning.advice import advice, reaches_all
from index.ann.tuning.recall import CONFIDENCE, Target, Truth, lower_end, recall_of_each, without_own

K_FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
# A setting is found to this share of itself, and times closer than this count as equal.
RESOLUTION = 0.02
# Two doublings in a row that gain less have found all that the codes can tell apart.
LEAST_GAIN = 0.001
# Seconds: what is over sooner is easily disturbed, and is measured by the quickest of three.
SHORT = 1.0
ROUNDS = 4
TIMED = 1000


@dataclass(frozen=True)
class Point:
    """One setting, measured."""

    settings: Settings
    recall: float
    """The mean over the queries."""
    at_least: float
    """The lower end of its interval."""
    microseconds: float
    """A query, in a batch of all of them, on `Tuning.threads` threads, by the clock."""
    compared: float
    """Codes compared with a query, where faiss counts them: a cost that no other work on the machine can change."""
    core_microseconds: float | None = None
    """Of processor time a query, on one thread; only of the settings that were compared by it."""

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **self.settings.known(),
            "recall": round(self.recall, 6),
            "at_least": round(self.at_least, 6),
            "microseconds": round(self.microseconds, 2),
            "compared": round(self.compared, 1),
            **({} if self.core_microseconds is None else {"core_microseconds": round(self.core_microseconds, 2)}),
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
    advice: str = ""
    """What to change, where the target is not met."""

    @property
    def met(self) -> bool:
        """Whether the chosen setting meets the target."""
        return self.chosen.at_least >= self.target.recall

    def line(self) -> str:
        """What came of it, for a person."""
        measured = f"recall@{self.target.k} {self.chosen.recall:.4f}, at least {self.chosen.at_least:.4f}"
        cost = f"{self.chosen.core_microseconds:,.0f} µs of one core a query"
        settings = str(self.chosen.settings) if self.chosen.settings.known() else ""
        if self.met:
            by = f" by {settings}" if settings else ""
            return f"recall target {self.target.recall:g} met{by}: {measured}; {cost}"
        by = f", by {settings}" if settings else ""
        return f"recall target {self.target.recall:g} NOT met: the best found is {measured}{by}; {self.advice}"

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
        chosen, spent_by_it = next(
            (point, spent) for point, spent in zip(met, times, strict=True) if spent <= fastest * (1 + RESOLUTION)
        )
    else:
        chosen = max(points, key=lambda point: (point.at_least, -point.compared))
        (spent_by_it,) = _times(index, truth, [chosen.settings])
    chosen = replace(chosen, core_microseconds=spent_by_it)
    points = [chosen if point.settings == chosen.settings else point for point in points]
    chosen.settings.apply(index)
    curve = sorted(points, key=lambda point: point.microseconds)
    # Of fewer than k passages, all are what was measured.
    target = replace(target, k=truth.k)
    missed = chosen.at_least < target.recall
    change = advice(index, mean_reaches=chosen.recall >= target.recall) if missed else ""
    return Tuning(target, chosen, curve, len(truth.queries), import_faiss().omp_get_max_threads(), change)


def measure(index: Any, truth: Truth, settings: Settings) -> Point:
    """Recall and time of `index` with `settings`, which stay applied."""
    faiss = import_faiss()
    settings.apply(index)
    faiss.cvar.indexIVF_stats.reset()
    faiss.cvar.hnsw_stats.reset()
    found, seconds = _timed(index, truth)
    inner = core(index)
    counted = faiss.cvar.hnsw_stats if isinstance(inner, faiss.IndexHNSW) else faiss.cvar.indexIVF_stats
    compared = counted.ndis if isinstance(inner, faiss.IndexHNSW | faiss.IndexIVF) else index.ntotal * len(found)
    if seconds < SHORT:
        seconds = min(seconds, *(_timed(index, truth)[1] for _ in range(2)))
    recalls = recall_of_each(found, truth)
    mean = float(recalls.mean())
    each = 1 / len(found)
    return Point(settings, mean, lower_end(recalls), 1e6 * seconds * each, float(compared) * each)


def _timed(index: Any, truth: Truth) -> tuple[np.ndarray, float]:
    """What `_found` gives, and the seconds it took."""
    started = time.perf_counter()
    found = _found(index, truth)
    return found, time.perf_counter() - started


def _found(index: Any, truth: Truth) -> np.ndarray:
    """The k rows that `index` finds for each query."""
    if truth.own is None:
        return index.search(truth.queries, truth.k)[1]
    scores, rows = index.search(truth.queries, truth.k + 1)
    return without_own(scores, rows, truth.own)[1]


def _times(index: Any, truth: Truth, settings: list[Settings]) -> list[float]:
    """Microseconds of processor time a query of each setting: its fastest round of several, in turns, on one thread."""
    faiss = import_faiss()
    some = replace(truth, queries=truth.queries[:TIMED], own=None if truth.own is None else truth.own[:TIMED])
    best = [np.inf] * len(settings)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for place, each in enumerate(settings):
                each.apply(index)
                started = time.thread_time()
                _found(index, some)
                best[place] = min(best[place], time.thread_time() - started)
    finally:
        faiss.omp_set_num_threads(threads)
    return [1e6 * seconds / len(some.queries) for seconds in best]


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
        # Whether the largest value finds everything, so that none is given up before it.
        self._exact = reaches_all(index)
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
        failed, value, recall, gain = low - 1, max(1, low), -1.0, np.inf
        while not self.meets(point := self.at(value, k_factor)):
            before, gain, recall = gain, point.recall - recall, point.recall
            # From about half of the recall on, each doubling gains less than the one before: when this one's gain, at
            # each of those left, is too little, so are they. Below that gains may rise, and only their end tells.
            doublings = np.ceil(np.log2(high / value)) if high > value else 0
            too_little = recall >= 0.5 and gain < before and recall + gain * doublings < self._recall
            if value >= high or (not self._exact and (too_little or max(gain, before) < LEAST_GAIN)):
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
