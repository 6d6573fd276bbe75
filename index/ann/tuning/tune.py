"""Finding the cheapest search settings of an index that reach a recall target, measured against exact search.

Recall and cost increase with every setting. With a single setting (nprobe or efSearch), the cheapest is therefore the
smallest that reaches the target. It is found by doubling and bisection without timing, so the result does not depend on
the load of the machine. An index with a refinement has two settings: for every k_factor the smallest nprobe is found in
the same way, and only these pairs are timed, in turns, on one thread. Each pair's fastest round counts, in processor
time, which other load disturbs far less than wall-clock time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from index.ann.factory import import_faiss, is_cagra
from index.ann.gpu.search import MAX_ITOPK, MAX_RESULTS, GpuIndex
from index.ann.settings import Settings, core, index_layers
from index.ann.tuning.advice import advice, exact_at_limit
from index.ann.tuning.measure import apply, measure, time_settings
from index.ann.tuning.recall import Target, Truth
from index.ann.tuning.result import Point, Tuning

K_FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
# Relative resolution of a setting; times closer than this count as equal.
RESOLUTION = 0.02
# The search stops after two consecutive doublings that gain less recall: the codes cannot distinguish more.
MIN_GAIN = 0.001


def tune(
    index: Any,
    truth: Truth,
    target: Target,
    progress: Callable[[str], None] | None = None,
    on_gpu: GpuIndex | None = None,
) -> Tuning:
    """Find the cheapest search settings that reach `target`, or those of highest recall if none do, and apply them.

    Args:
        index: a faiss index of the rows that `truth` is about.
        truth: exact neighbors, from `find_truth`.
        target: the recall target.
        progress: called with a line of text for each measured setting.
        on_gpu: its copy on GPUs, to measure there. Default: None, on the CPU.

    Returns:
        What was measured and chosen.
    """
    search = _SettingSearch(index, truth, target.recall, progress, on_gpu)
    refines = any(isinstance(part, import_faiss().IndexRefine) for part in index_layers(index))
    found = search.smallest_pairs() if refines else [search.least(None, 1, search.limit)]
    met = [point for point in found if point is not None]
    points = list(search.measured.values())
    if met:
        times = time_settings(index, truth, [point.settings for point in met], on_gpu)
        fastest = min(times)
        chosen, core_time = next(
            (point, cpu_time)
            for point, cpu_time in zip(met, times, strict=True)
            if cpu_time <= fastest * (1 + RESOLUTION)
        )
    else:
        chosen = max(
            points,
            key=lambda point: (point.at_least, -(point.microseconds if point.compared is None else point.compared)),
        )
        (core_time,) = time_settings(index, truth, [chosen.settings], on_gpu)
    if on_gpu is None:
        chosen = replace(chosen, core_microseconds=core_time)
    points = [chosen if point.settings == chosen.settings else point for point in points]
    apply(chosen.settings, index, on_gpu)
    curve = sorted(points, key=lambda point: point.microseconds)
    # With fewer than k passages, recall was measured at their number.
    target = replace(target, k=truth.k)
    missed = chosen.at_least < target.recall
    change = advice(index, mean_reaches=chosen.recall >= target.recall) if missed else ""
    threads, device = import_faiss().omp_get_max_threads(), "cpu" if on_gpu is None else on_gpu.device
    return Tuning(target, chosen, curve, len(truth.queries), threads, change, device)


class _SettingSearch:
    """Searches for the smallest settings that reach a target, and records every measurement."""

    def __init__(
        self,
        index: Any,
        truth: Truth,
        recall: float,
        progress: Callable[[str], None] | None,
        on_gpu: GpuIndex | None,
    ) -> None:
        faiss = import_faiss()
        self._index = index
        self._on_gpu = on_gpu
        self._truth = truth
        self._recall = recall
        self._progress = progress
        inner = core(index)
        self._kind = "nprobe" if isinstance(inner, faiss.IndexIVF) else "ef_search"
        # Largest value of the setting; 0 if the index has none.
        self.limit = 0
        if isinstance(inner, faiss.IndexIVF):
            self.limit = int(inner.nlist)
        elif isinstance(inner, faiss.IndexHNSW):
            self.limit = int(min(max(index.ntotal, 1), 8192))
        if on_gpu is not None:
            self.limit = min(self.limit, MAX_ITOPK if is_cagra(inner) else MAX_RESULTS)
        # If the largest value is exact, the search must not stop before it.
        self._exact = exact_at_limit(index)
        self.measured: dict[Settings, Point] = {}

    def at(self, value: int, k_factor: float | None) -> Point:
        """The measurement of a setting, cached."""
        settings = Settings(k_factor=k_factor)
        if self.limit:
            settings = replace(settings, **{self._kind: value})
        if settings not in self.measured:
            self.measured[settings] = point = measure(self._index, self._truth, settings, self._on_gpu)
            if self._progress is not None:
                self._progress(f"{settings}: recall {point.recall:.4f}")
        return self.measured[settings]

    def meets(self, point: Point) -> bool:
        return point.at_least >= self._recall

    def least(self, k_factor: float | None, low: int, high: int) -> Point | None:
        """The smallest value from `low` to `high` that reaches the target; None if none does."""
        failed, value, recall, gain = low - 1, max(1, low), -1.0, np.inf
        while not self.meets(point := self.at(value, k_factor)):
            before, gain, recall = gain, point.recall - recall, point.recall
            # Above a recall of about one half, each doubling gains less than the one before: stop if even the present
            # gain, repeated at every remaining doubling, would not reach the target. Below, gains may still grow.
            doublings = np.ceil(np.log2(high / value)) if high > value else 0
            too_little = recall >= 0.5 and gain < before and recall + gain * doublings < self._recall
            if value >= high or (not self._exact and (too_little or max(gain, before) < MIN_GAIN)):
                return None
            failed, value = value, min(2 * value, high)
        met = value
        while met - failed > max(1, RESOLUTION * met):
            middle = (met + failed) // 2
            if self.meets(self.at(middle, k_factor)):
                met = middle
            else:
                failed = middle
        self._extend_curve(met, k_factor)
        return self.at(met, k_factor)

    def smallest_pairs(self) -> list[Point | None]:
        """The smallest nprobe (or efSearch) that reaches the target, for each k_factor.

        Stops when a larger k_factor no longer reduces it.
        """
        found: list[Point | None] = []
        high = self.limit
        for k_factor in K_FACTORS:
            if k_factor > 1 and k_factor * self._truth.k > 2 * self._index.ntotal:
                break
            if self._on_gpu is not None and k_factor * (self._truth.k + 1) > MAX_RESULTS:
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

    def _extend_curve(self, met: int, k_factor: float | None) -> None:
        """Measure settings beyond the target, so that the curve shows the cost of a higher recall."""
        for value in (met * 3 // 2, 2 * met, 4 * met):
            if k_factor is not None or value > self.limit or self.at(value, k_factor).recall > 0.999:
                break
