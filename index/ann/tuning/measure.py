"""Measuring recall, time and cost of settings of an index, on the CPU or on its copy on GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.gpu.search import MAX_RESULTS, GpuIndex, to_gpus
from index.ann.gpu.support import NotOnGpu
from index.ann.settings import Settings, core
from index.ann.tuning.recall import Target, Truth, lower_bound, recall_of_each, without_own
from index.ann.tuning.result import Point

# A search faster than this many seconds is easily disturbed: take the fastest of three.
SHORT_SECONDS = 1.0
TIMING_ROUNDS = 4
TIMED_QUERIES = 1000


def measured_on_gpu(
    index: Any, target: Target, note: Callable[[str], None] | None, device: str = "cuda", *, optional: bool = True
) -> GpuIndex | None:
    """A copy of a faiss index on GPUs, for `tune`; None where that is not possible.

    Args:
        index: the faiss index.
        target: the recall target.
        note: called with the reason if it is not possible.
        device: "cuda", or "cuda:1" for a certain GPU.
        optional: Default: True. False raises the reason instead.

    Raises:
        NotOnGpu: it is not possible, and not optional.
    """
    try:
        if target.k >= MAX_RESULTS:
            raise NotOnGpu(f"GPUs find at most {MAX_RESULTS:,} results, expected a smaller k, found {target.k}")
        return to_gpus(index, device)
    except NotOnGpu as error:
        if not optional:
            raise
        if note is not None:
            note(f"factory: recall is measured on the CPU: {error}")
        return None


def measure(index: Any, truth: Truth, settings: Settings, on_gpu: GpuIndex | None = None) -> Point:
    """Measure recall and time of `index`, or of its copy on GPUs, with `settings`, which stay applied."""
    faiss = import_faiss()
    apply(settings, index, on_gpu)
    faiss.cvar.indexIVF_stats.reset()
    faiss.cvar.hnsw_stats.reset()
    searched = index if on_gpu is None else on_gpu
    found, seconds = _timed(searched, truth)
    compared = None if on_gpu is not None else _compared(index, len(found))
    if seconds < SHORT_SECONDS:
        seconds = min(seconds, *(_timed(searched, truth)[1] for _ in range(2)))
    recalls = recall_of_each(found, truth)
    return Point(settings, float(recalls.mean()), lower_bound(recalls), 1e6 * seconds / len(found), compared)


def apply(settings: Settings, index: Any, on_gpu: GpuIndex | None) -> None:
    """Set the search parameters of `index`, and of its copy on GPUs if there is one."""
    settings.apply(index)
    if on_gpu is not None:
        on_gpu.apply(settings)


def _compared(index: Any, queries: int) -> float:
    """Codes compared per query in the last search, as counted by faiss."""
    faiss = import_faiss()
    inner = core(index)
    counted = faiss.cvar.hnsw_stats if isinstance(inner, faiss.IndexHNSW) else faiss.cvar.indexIVF_stats
    compared = counted.ndis if isinstance(inner, faiss.IndexHNSW | faiss.IndexIVF) else index.ntotal * queries
    return float(compared) / queries


def _timed(index: Any, truth: Truth) -> tuple[np.ndarray, float]:
    """The result of `_found`, and its wall-clock time in seconds."""
    started = time.perf_counter()
    found = _found(index, truth)
    return found, time.perf_counter() - started


def _found(index: Any, truth: Truth) -> np.ndarray:
    """The k rows that `index`, on a CPU or GPUs, returns for each query: [Q, k] int64."""
    if truth.own is None:
        return index.search(truth.queries, truth.k)[1]
    scores, rows = index.search(truth.queries, truth.k + 1)
    return without_own(scores, rows, truth.own)[1]


def time_settings(index: Any, truth: Truth, settings: list[Settings], on_gpu: GpuIndex | None) -> list[float]:
    """Processor time per query of each setting in µs: the fastest of several rounds, in turns, on one thread.

    On a GPU, wall-clock time, of all queries in one batch.
    """
    faiss = import_faiss()
    timed = replace(
        truth, queries=truth.queries[:TIMED_QUERIES], own=None if truth.own is None else truth.own[:TIMED_QUERIES]
    )
    searched, clock = index, time.thread_time
    if on_gpu is not None:
        timed, searched, clock = truth, on_gpu, time.perf_counter
    best = [np.inf] * len(settings)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for _ in range(TIMING_ROUNDS):
            for number, each in enumerate(settings):
                apply(each, index, on_gpu)
                started = clock()
                _found(searched, timed)
                best[number] = min(best[number], clock() - started)
    finally:
        faiss.omp_set_num_threads(threads)
    return [1e6 * seconds / len(timed.queries) for seconds in best]
