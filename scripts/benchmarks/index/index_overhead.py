"""Our build and search against faiss driven by hand: same factory, sample, threads and settings, in turns.

What a build does besides faiss's work, checking the store and summing what it writes, is in proportion to the bytes:
`besides_processor_s` and `besides_gib` say how much, whatever the factory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np

from index.ann.build import Plan, add, build, reserve
from index.ann.factory import make
from index.ann.index import Index
from index.ann.settings import set_search_defaults
from index.ann.train import sample_vectors, train
from index.store.parts import Part
from index.store.reader import EmbeddingStore
from scripts.datasets.index_sets import read_set

CASES = {
    "clustered-10k": ("SQ8", "HNSW16"),
    "clustered-100k": ("Flat", "SQ8", "IVF1024,Flat", "IVF1024,SQ8"),
    "clustered-1m": ("SQ8",),
}
# Rounds go on until one of them has taken so many seconds by the clock, and there are at least so many.
SECONDS = 8.0
LEAST_ROUNDS = 3
# Queries times passages searched in a round, and queries at most: a round of a million passages would take minutes.
COMPARED = 10**8
QUERIES = 1_000
K = 10


def rows(sets: Path, only: str | None, only_factory: str | None) -> Iterator[dict[str, Any]]:
    """Medians of ours and of faiss, and the medians of the ratios of neighbouring runs.

    OMP_WAIT_POLICY=passive keeps threads that wait from counting as work.
    """
    for name, factories in CASES.items():
        if only in (None, name):
            store, queries = read_set(sets / name)
            queries = queries[: min(QUERIES, COMPARED // store.rows)]
            for factory in (only_factory,) if only_factory else factories:
                with tempfile.TemporaryDirectory(dir=sets) as temporary:
                    yield {"set": name, **_compare(store, queries, factory, Path(temporary))}


def _compare(store: EmbeddingStore, queries: np.ndarray, factory: str, folder: Path) -> dict[str, Any]:
    ours_at, theirs_at = folder / "index", folder / "plain.faiss"
    trained_on = _trained_on(store, ours_at, factory)

    builds = _in_turns(
        faiss=lambda: _by_hand(store, theirs_at, factory, trained_on),
        index=lambda: _index_alone(store, folder / "alone.faiss", factory),
        build=lambda: build(store, ours_at, Plan(factory)),
    )
    ours, theirs = Index.open(ours_at), faiss.read_index(str(theirs_at))
    if "HNSW" not in factory:  # two threads that build a graph never build the same one twice
        np.testing.assert_array_equal(ours.search_rows(queries, K)[1][:, 0], theirs.search(queries, K)[1][:, 0])
    # One and the same index, so that what differs is what ours does besides.
    searches = _in_turns(faiss=lambda: ours.faiss.search(queries, K), search=lambda: ours.search_rows(queries, K))
    row: dict[str, Any] = {"factory": factory, "threads": faiss.omp_get_max_threads(), "rounds": len(builds["faiss"])}
    row["build_faiss_s"] = round(median(clock for clock, _ in builds["faiss"]), 4)
    row["search_faiss_s"] = round(median(clock for clock, _ in searches["faiss"]), 4)
    for times in (builds, searches):
        for what in list(times)[1:]:
            pairs = list(zip(times[what], times["faiss"], strict=True))
            row[f"{what}_ratio"] = round(median(us / them for (us, _), (them, _) in pairs), 3)
            row[f"{what}_processor_ratio"] = round(median(us / them for (_, us), (_, them) in pairs), 3)
    pairs = list(zip(builds["build"], builds["index"], strict=True))
    row["besides_processor_s"] = round(median(whole - alone for (_, whole), (_, alone) in pairs), 4)
    row["besides_gib"] = round(_bytes_besides(store, ours) / 2**30, 4)
    return row


def _bytes_besides(store: EmbeddingStore, index: Index) -> int:
    """What is summed: the store and the index, every byte."""
    return sum(entry.bytes for manifest in (store.manifest, index.manifest) for entry in manifest.files.values())


def _trained_on(store: EmbeddingStore, out: Path, factory: str) -> int:
    build(store, out, Plan(factory))
    return Index.open(out).manifest.count("trained_on")


def _index_alone(store: EmbeddingStore, path: Path, factory: str) -> None:
    """What `build` does with faiss, without its checks of the store, the passages, and how it writes and sums."""
    index = make(factory, store.dim)
    train(index, store, factory, 0, without=np.empty(0, np.int64))
    if not Part(store).in_one_piece:
        reserve(index, store.rows)
    add(index.add, Part(store), None)
    set_search_defaults(index)
    faiss.write_index(index, str(path))


def _by_hand(store: EmbeddingStore, path: Path, factory: str, trained_on: int) -> None:
    """What a careful user of faiss writes: train on a sample, add shard by shard, save the file."""
    index = faiss.index_factory(store.dim, factory, faiss.METRIC_INNER_PRODUCT)
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.cp.seed = 0
    if trained_on:
        index.train(sample_vectors(store, trained_on, 0))
    for _, vectors in store.shards():
        index.add(np.ascontiguousarray(vectors, np.float32))
    set_search_defaults(index)
    faiss.write_index(index, str(path))


def _in_turns(**ways: Callable[[], Any]) -> dict[str, list[tuple[float, float]]]:
    """Of every round of each, seconds by the clock and of the processors, which others on the machine disturb less.

    Each round begins with another one. The first is not counted.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    while len(times[names[0]]) <= LEAST_ROUNDS or sum(clock for clock, _ in times[names[0]]) < SECONDS:
        for name in names:
            started, worked = time.perf_counter(), time.process_time()
            ways[name]()
            times[name].append((time.perf_counter() - started, time.process_time() - worked))
        names.append(names.pop(0))
    return {name: found[1:] for name, found in times.items()}
