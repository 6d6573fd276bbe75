"""Whether a recall target is kept on new queries, and how close the tuned settings are to the cheapest ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.build import add
from index.ann.factory import make
from index.ann.settings import Settings
from index.ann.train import train
from index.ann.tuning.graphs import add_held_out, is_graph, truth_for_held_out
from index.ann.tuning.measure import measure
from index.ann.tuning.recall import Target, Truth, find_truth, recall_of_each
from index.ann.tuning.tune import K_FACTORS, tune
from index.store.parts import Part
from scripts.datasets.index_sets import read_set

K = 10
TARGET = 0.95
FACTORIES = {
    "clustered-100k": ("IVF1024,PQ64x4fs,RFlat", "IVF1024,Flat", "HNSW32"),
    "wordnet": ("IVF1024,Flat", "HNSW32"),
    "clustered-1m": ("IVF4096,PQ64x4fs,Refine(SQ8)",),
}
TUNED_ON = 2_000
MEASURED_ON = 4_000
ROUNDS = 5


def rows(sets: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """A row for every set, factory and kind of tuning queries: real queries, or held-out passages."""
    for name, factories in FACTORIES.items():
        if only not in (None, name):
            continue
        store, queries = read_set(sets / name)
        real, passages = Target(TARGET, K, queries[:TUNED_ON]), Target(TARGET, K, held_out=TUNED_ON)
        none, held_out = np.empty(0, np.int64), passages.held_out_rows(store.rows, 0)
        truths = {"queries": find_truth(store, real, none), "held-out passages": find_truth(store, passages, held_out)}
        other = find_truth(store, Target(TARGET, K, queries[-MEASURED_ON:]), none)
        for factory in factories:
            index = make(factory, store.dim)
            train(index, store, factory, 0, without=held_out)
            add(index.add, Part(store), None)
            for tuned_on, truth in truths.items():
                if is_graph(index) and truth.own is not None:
                    # A graph cannot lose vectors, so it is built again without the held-out passages.
                    index, truth = make(factory, store.dim), truth_for_held_out(store, passages, held_out)
                    add(index.add, Part(store), None, without=held_out)
                started = time.perf_counter()
                tuning = tune(index, truth, real)
                if index.ntotal < store.rows:
                    add_held_out(index, store, held_out)
                chosen = tuning.chosen.settings
                row = {
                    "set": name,
                    "factory": factory,
                    "tuned_on": tuned_on,
                    "queries": tuning.queries,
                    "settings": str(chosen),
                    "met": tuning.met,
                    "recall_measured": round(tuning.chosen.recall, 4),
                    "at_least": round(tuning.chosen.at_least, 4),
                    "recall_other_queries": round(_measured(index, other, chosen)[0], 4),
                    "tune_s": round(time.perf_counter() - started, 1),
                    "threads": tuning.threads,
                }
                yield {**row, **(_against_grid(index, other, chosen) if tuned_on == "queries" else {})}


def _against_grid(index: Any, other: Truth, chosen: Settings) -> dict[str, Any]:
    """The cheapest setting of a fine grid that has the chosen setting's recall, or the target's, on the new queries."""
    grid = [settings for settings in _grid(chosen) if settings != chosen]
    recalls = {settings: _measured(index, other, settings)[0] for settings in grid}
    ours = _measured(index, other, chosen)[0]
    found: dict[str, Any] = {"grid": len(grid)}
    if chosen.k_factor is None:
        # With a single setting, the number of compared codes measures the work without a clock.
        compared = {settings: measure(index, other, settings).compared for settings in (chosen, *grid)}
        for column, recall in (("at_this_recall", ours), ("at_the_target", TARGET)):
            best = min(
                (each for each in (chosen, *grid) if each == chosen or recalls[each] >= recall), key=compared.get
            )
            found[f"cheaper_{column}"] = round(1 - compared[best] / compared[chosen], 3)
            found[f"cheapest_{column}"] = str(best)
        return found
    for column, recall in (("at_this_recall", ours), ("at_the_target", TARGET)):
        reach = [settings for settings in grid if recalls[settings] >= recall]
        if not reach:
            found[f"cheaper_{column}"] = 0.0
            continue
        # Candidates by the amount of work, then timed alternately with the chosen setting.
        best = sorted(reach, key=lambda settings: _work(settings, chosen))[:4]
        times = {settings: np.inf for settings in (chosen, *best)}
        for _ in range(ROUNDS):
            for settings in times:
                times[settings] = min(times[settings], _measured(index, other, settings)[1])
        cheapest = min(best, key=times.__getitem__)
        found[f"cheaper_{column}"] = round(1 - times[cheapest] / times[chosen], 3)
        found[f"cheapest_{column}"] = str(cheapest)
    return found


def _grid(chosen: Settings) -> Iterator[Settings]:
    """Settings around the chosen one: in steps of 5 %, with every k_factor near it that tuning tries."""
    shares = [0.55 + 0.05 * step for step in range(18)]
    if chosen.ef_search is not None:
        for value in sorted({round(share * chosen.ef_search) for share in shares}):
            yield Settings(ef_search=value)
    elif chosen.nprobe is not None:
        factors: tuple[float | None, ...] = (None,)
        if chosen.k_factor is not None:
            factors = tuple(factor for factor in K_FACTORS if chosen.k_factor / 2 <= factor <= 2 * chosen.k_factor)
        for factor in factors:
            for value in sorted({max(1, round(share * chosen.nprobe)) for share in shares}):
                yield Settings(nprobe=value, k_factor=factor)


def _work(settings: Settings, chosen: Settings) -> float:
    """Lists and candidates, each relative to the chosen setting."""
    return sum(
        value / (reference or 1)
        for (name, value), reference in zip(settings.known().items(), chosen.known().values(), strict=True)
    )


def _measured(index: Any, truth: Truth, settings: Settings) -> tuple[float, float]:
    """Mean recall and processor seconds. Run on one thread (OMP_NUM_THREADS=1), whose time alone is measured."""
    settings.apply(index)
    started = time.thread_time()
    found = index.search(truth.queries, truth.k)[1]
    return float(recall_of_each(found, truth).mean()), time.thread_time() - started
