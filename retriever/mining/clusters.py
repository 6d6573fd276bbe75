"""Topic clusters of the rows of a training source: k-means over embeddings of their positives."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from index.ann.factory import import_faiss
from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from index.progress import Reporter
from retriever.data.false_negatives import Integers
from retriever.data.schedules.clustered import merge_small
from retriever.data.table import ExampleTable
from retriever.encoding.encoder import embed_texts
from retriever.encoding.model import Model

CHUNK_ROWS = 2**16
ITERATIONS = 20
# As faiss recommends.
POINTS_PER_CENTROID = 256


def cluster_rows(
    model: Model, table: ExampleTable, clusters: int, *, minimum: int, seed: int, cache: Path, reporter: Reporter
) -> list[Integers]:
    """Divide the rows of a table into topic clusters.

    The first positive of each row is embedded. The clusters are those of spherical k-means with the seed. They stay in
    the folder `cache` with a checksum and are read from there if table, model, number and seed are the same.

    Args:
        model: The model in evaluation mode.
        table: The examples.
        clusters: Number of clusters, at most one for each `minimum` rows.
        minimum: Least number of rows of a cluster; smaller ones are merged with the nearest one.
        seed: Seed of the choice of the first centroids.
        cache: Folder for the result.
        reporter: Shows progress.

    Returns:
        The rows of each cluster, sorted, int64.

    Raises:
        InputError: The file in the cache is damaged.
    """
    clusters = max(1, min(clusters, len(table) // minimum))
    about = [table.sha256, model.towers.fingerprint(), model.options.precision, clusters, seed]
    path = cache / f"clusters-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.npz"
    sums = path.with_suffix(".json")
    if not sums.exists():
        cache.mkdir(parents=True, exist_ok=True)
        assignment, centroids = _k_means(model, table, clusters, seed, cache, reporter)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, assignment=assignment, centroids=centroids)
        write_json(sums, {"sha256": sha256_file(path)})
    if not path.exists() or sha256_file(path) != read_json(sums)["sha256"]:
        raise InputError(f"{path}: damaged, its checksum differs: remove {sums} to make the clusters again")
    with np.load(path, allow_pickle=False) as arrays:
        return merge_small(arrays["assignment"], arrays["centroids"], minimum)


def _k_means(
    model: Model, table: ExampleTable, clusters: int, seed: int, folder: Path, reporter: Reporter
) -> tuple[Integers, np.ndarray]:
    """Return the cluster of each row, and the centroids [clusters, D], by faiss."""
    faiss = import_faiss()
    rows, dim = len(table), model.dimension
    with tempfile.TemporaryFile(dir=folder) as file:
        with reporter.bar(f"encode {table.name}", rows, "rows") as advance:
            for start in range(0, rows, CHUNK_ROWS):
                texts = [table[row].positives[0] for row in range(start, min(rows, start + CHUNK_ROWS))]
                vectors = embed_texts(model.towers, texts, "document", model.options, advance)
                file.write(np.ascontiguousarray(vectors, np.float32).tobytes())
        file.flush()
        stored = np.memmap(file, np.float32, "r", shape=(rows, dim))
        sample = np.arange(rows)
        if rows > POINTS_PER_CENTROID * clusters:
            size = POINTS_PER_CENTROID * clusters
            sample = np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))
        reporter.line(f"{table.name}: {clusters} topic clusters by k-means over {len(sample):,} rows")
        k_means = faiss.Kmeans(
            dim, clusters, niter=ITERATIONS, seed=seed % 2**31, spherical=True, min_points_per_centroid=1
        )
        k_means.train(np.ascontiguousarray(stored[sample]))
        parts = [
            k_means.index.search(np.ascontiguousarray(stored[start : start + CHUNK_ROWS]), 1)[1][:, 0]
            for start in range(0, rows, CHUNK_ROWS)
        ]
    return np.concatenate(parts).astype(np.int64), np.asarray(k_means.centroids)
