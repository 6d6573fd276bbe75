"""Our build and search against plain faiss with the same factory, training sample, threads and settings, alternately.

Beyond the work of faiss, a build checks every byte of the store and computes checksums of what it writes, which costs
time in proportion to the bytes: `besides_processor_s` and `besides_gib` state both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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
from scripts.benchmarks.timing import time_alternately
from scripts.datasets.index_sets import read_set

CASES = {
    "clustered-10k": ("SQ8", "HNSW16"),
    "clustered-100k": ("Flat", "SQ8", "IVF1024,Flat", "IVF1024,SQ8"),
    "clustered-1m": ("SQ8",),
}
# Rounds continue until the first method has taken MIN_SECONDS, and for at least MIN_ROUNDS.
MIN_SECONDS = 8.0
MIN_ROUNDS = 3
# Limits of a round: queries times passages, and queries.
MAX_COMPARED = 10**8
MAX_QUERIES = 1_000
K = 10


def rows(sets: Path, only: str | None, only_factory: str | None) -> Iterator[dict[str, Any]]:
    """Medians of our times and those of faiss, and medians of the ratios of neighboring runs.

    With OMP_WAIT_POLICY=passive, waiting threads do not count as processor time.
    """
    for name, factories in CASES.items():
        if only in (None, name):
            store, queries = read_set(sets / name)
            queries = queries[: min(MAX_QUERIES, MAX_COMPARED // store.rows)]
            for factory in (only_factory,) if only_factory else factories:
                with tempfile.TemporaryDirectory(dir=sets) as temporary:
                    yield {"set": name, **_compare(store, queries, factory, Path(temporary))}


def _compare(store: EmbeddingStore, queries: np.ndarray, factory: str, folder: Path) -> dict[str, Any]:
    ours_at, theirs_at = folder / "index", folder / "plain.faiss"
    trained_on = _trained_on(store, ours_at, factory)

    builds = time_alternately(
        {
            "faiss": lambda: _by_hand(store, theirs_at, factory, trained_on),
            "index": lambda: _index_alone(store, folder / "alone.faiss", factory),
            "build": lambda: build(store, ours_at, Plan(factory)),
        },
        MIN_ROUNDS,
        min_seconds=MIN_SECONDS,
    )
    ours, theirs = Index.open(ours_at), faiss.read_index(str(theirs_at))
    if "HNSW" not in factory:  # With several threads, building a graph is not deterministic.
        np.testing.assert_array_equal(ours.search_rows(queries, K)[1][:, 0], theirs.search(queries, K)[1][:, 0])
    # Both search the same index, so that the difference is our overhead.
    searches = time_alternately(
        {"faiss": lambda: ours.faiss.search(queries, K), "search": lambda: ours.search_rows(queries, K)},
        MIN_ROUNDS,
        min_seconds=MIN_SECONDS,
    )
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
    """Bytes that are checksummed: all files of the store and the index."""
    return sum(entry.bytes for manifest in (store.manifest, index.manifest) for entry in manifest.files.values())


def _trained_on(store: EmbeddingStore, out: Path, factory: str) -> int:
    build(store, out, Plan(factory))
    return Index.open(out).manifest.count("trained_on")


def _index_alone(store: EmbeddingStore, path: Path, factory: str) -> None:
    """The faiss part of `build`, without the checks of the store, the passages, and checksums."""
    index = make(factory, store.dim)
    train(index, store, factory, 0, without=np.empty(0, np.int64))
    if not Part(store).in_one_piece:
        reserve(index, store.rows)
    add(index.add, Part(store), None)
    set_search_defaults(index)
    faiss.write_index(index, str(path))


def _by_hand(store: EmbeddingStore, path: Path, factory: str, trained_on: int) -> None:
    """What a careful user of faiss writes: train on a sample, add shard by shard, write the file."""
    index = faiss.index_factory(store.dim, factory, faiss.METRIC_INNER_PRODUCT)
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.cp.seed = 0
    if trained_on:
        index.train(sample_vectors(store, trained_on, 0))
    for _, vectors in store.shards():
        index.add(np.ascontiguousarray(vectors, np.float32))
    set_search_defaults(index)
    faiss.write_index(index, str(path))
