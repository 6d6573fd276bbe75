"""Training FAISS indexes on a random sample of an embedding store."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.faiss_file import read_trained
from index.ann.gpu.build import cluster_on_gpus
from index.ann.index import Index
from index.ann.layout import FAISS_FILE
from index.ann.settings import core, flat_codes, index_layers, set_search_defaults
from index.files import InputError
from index.store.reader import EmbeddingStore

# faiss asks for at least 39 training vectors per centroid and uses no more than 256; more take time and memory. An
# 8-bit code counts as 256 centroids.
PER_CENTROID = 64
MIN_PER_CENTROID = 39
CODE_CENTROIDS = 256


def train(
    index: Any,
    store: EmbeddingStore,
    factory: str,
    seed: int,
    *,
    without: np.ndarray,
    gpu: bool = False,
    note: Callable[[str], None] | None = None,
) -> int:
    """Train `index` on a random sample of rows.

    Args:
        index: empty.
        store: the vectors to sample.
        factory: factory string, for error messages.
        seed: seed of the sample and of k-means.
        without: rows that are held out of training, int64, because recall will be measured with them.
        gpu: run k-means on all GPUs that faiss finds. Default False.
        note: called with a warning if there are fewer training vectors than recommended.

    Returns:
        Number of training vectors; 0 if the index needs no training.

    Raises:
        InputError: there are fewer vectors than centroids.
    """
    if index.is_trained:
        return 0
    faiss = import_faiss()
    inner = core(index)
    centroids = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    if centroids:
        inner.cp.seed = seed
    if store.rows < centroids:
        raise InputError(
            f"factory {factory!r}: expected at least {centroids} vectors to train {centroids} centroids "
            f"({MIN_PER_CENTROID * centroids} to do it well), found {store.rows}; choose fewer, or 'Flat'"
        )
    wanted = min(PER_CENTROID * max(centroids, CODE_CENTROIDS), store.rows)
    # A small store cannot hold rows out, and each of them changes the centroids little.
    if store.rows - len(without) < MIN_PER_CENTROID * max(centroids, CODE_CENTROIDS):
        without = without[:0]
    sample = sample_vectors(store, min(wanted, store.rows - len(without)), seed, without)
    with _warn_once(index, factory, len(sample), note), cluster_on_gpus(index) if gpu else contextlib.nullcontext():
        index.train(sample)
    return len(sample)


@contextlib.contextmanager
def _warn_once(index: Any, factory: str, vectors: int, note: Callable[[str], None] | None) -> Iterator[None]:
    """Report once that there are few training vectors; faiss prints a warning for every clustering, up to hundreds."""
    rotations = [each for each in _rotations(index) if each.pq is None]
    for rotation in rotations:
        # faiss creates this quantizer during training if it is not set; created here, its parameters can be changed.
        rotation.own_quantizer = rotation.pq = import_faiss().ProductQuantizer(rotation.d_out, rotation.M, 8)
    most = 0
    for parameters, centroids in _clusterings(index):
        parameters.min_points_per_centroid = 1
        most = max(most, centroids)
    # A single centroid is the mean, for which any number of vectors will do.
    if most > 1 and vectors < MIN_PER_CENTROID * most and note is not None:
        note(
            f"factory {factory!r}: trained on {vectors:,} vectors; to find {most:,} centroids well takes "
            f"{MIN_PER_CENTROID * most:,}, {MIN_PER_CENTROID} for each"
        )
    try:
        yield
    finally:
        for rotation in rotations:
            rotation.pq = None


def _rotations(index: Any) -> list[Any]:
    """The OPQ matrices in front of an index."""
    faiss = import_faiss()
    chains = [part.chain for part in index_layers(index) if isinstance(part, faiss.IndexPreTransform)]
    transforms = [
        faiss.downcast_VectorTransform(chain.at(number)) for chain in chains for number in range(chain.size())
    ]
    return [transform for transform in transforms if isinstance(transform, faiss.OPQMatrix)]


def _clusterings(index: Any) -> Iterator[tuple[Any, int]]:
    """Yield (clustering parameters, number of centroids) of every k-means that training runs."""
    faiss = import_faiss()
    inner, quantizers = core(index), [rotation.pq for rotation in _rotations(index)]
    coded = [inner, *flat_codes(index)]
    if isinstance(inner, faiss.IndexIVF):
        yield inner.cp, inner.nlist
        coded.append(faiss.downcast_index(inner.quantizer))
    for part in coded:
        quantizers += [getattr(part, name, None) for name in ("pq", "rq")]
        if hasattr(part, "prq"):
            subquantizers = [part.prq.subquantizer(number) for number in range(part.prq.nsplits)]
            quantizers += [faiss.downcast_AdditiveQuantizer(each) for each in subquantizers]
    for quantizer in quantizers:
        if isinstance(quantizer, faiss.ProductQuantizer):
            yield quantizer.cp, quantizer.ksub
        elif isinstance(quantizer, faiss.ResidualQuantizer):
            yield quantizer.cp, 1 << quantizer.nbits.at(0)


def sample_vectors(store: EmbeddingStore, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` vectors [count, D] float32 of different random rows, none of `without`, in row order."""
    return read_rows(store, sample_rows(store.rows, count, seed, without))


def sample_rows(rows: int, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` different random rows below `rows`, none of `without`: ascending int64."""
    barred = np.empty(0, np.int64) if without is None else without
    # Draw enough extra rows to drop those of `without`; this needs no list of all other rows.
    drawn = np.random.default_rng(seed).choice(rows, min(rows, count + len(barred)), replace=False, shuffle=False)
    return np.sort(drawn[~np.isin(drawn, barred)][:count])


def read_rows(store: EmbeddingStore, rows: np.ndarray) -> np.ndarray:
    """The vectors [n, D] float32 of the rows [n] of a store, which must be ascending."""
    vectors_read = np.empty((len(rows), store.dim), np.float32)
    taken = 0
    for first, vectors in store.shards():
        stop = int(np.searchsorted(rows, first + len(vectors)))
        vectors_read[taken:stop] = vectors[rows[taken:stop] - first]
        taken = stop
    return vectors_read


def empty_trained_index(source: Index) -> Any:
    """An empty index with the training of `source` and default search settings.

    Raises:
        InputError: faiss cannot read `source`, or its training does not match the hash in its manifest because it was
            made from a damaged index.
    """
    index = read_trained(source.folder / FAISS_FILE)
    set_search_defaults(index)
    stated, found = source.manifest.field("trained", str), fingerprint(index)
    if found != stated:
        raise InputError(
            f"{source.folder / FAISS_FILE}: expected the training of sha256 {stated[:12]}… that its manifest states, "
            f"found {found[:12]}…: it was made from a damaged index, or by another version of faiss; build it again"
        )
    return index


def fingerprint(index: Any) -> str:
    """sha256 of an empty trained index. Indexes with equal fingerprints encode vectors alike and can be merged."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexNSG):
        # Uninitialized until vectors are added.
        inner.nsg.enterpoint = 0
    digest = hashlib.sha256()

    def update(data: bytes) -> int:
        digest.update(data)
        return len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(update))
    return digest.hexdigest()
