"""Training FAISS indexes on vectors drawn at random from an embedding store."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.gpu import clustering
from index.ann.index import Index, read_trained
from index.ann.layout import FAISS_FILE
from index.ann.settings import core, flat_codes, parts, set_search_defaults
from index.files import InputError
from index.store.reader import EmbeddingStore

# faiss asks for at least 39 training vectors a centroid and uses no more than 256. More of them take time, and memory
# beside the index; a code of one byte counts as 256 centroids.
PER_CENTROID = 64
LEAST = 39
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
    """Train `index` on rows drawn at random; returns how many, 0 when it needs no training.

    Args:
        index: empty.
        store: where the vectors are drawn from.
        factory: names it in errors.
        seed: of the sample and of k-means.
        without: rows that must not be trained on, because the index will be measured by them.
        gpu: cluster on all GPUs that faiss finds.
        note: called with a line where the vectors are fewer than clustering them well takes.

    Raises:
        InputError: there are too few vectors.
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
            f"({LEAST * centroids} to do it well), found {store.rows}; choose fewer, or 'Flat'"
        )
    wanted = min(PER_CENTROID * max(centroids, CODE_CENTROIDS), store.rows)
    # A small store has none to spare, and of those that it is measured by later each changes the centroids little.
    if store.rows - len(without) < LEAST * max(centroids, CODE_CENTROIDS):
        without = without[:0]
    sample = sample_vectors(store, min(wanted, store.rows - len(without)), seed, without)
    with _told_once(index, factory, len(sample), note), clustering(index) if gpu else contextlib.nullcontext():
        index.train(sample)
    return len(sample)


@contextlib.contextmanager
def _told_once(index: Any, factory: str, vectors: int, note: Callable[[str], None] | None) -> Iterator[None]:
    """Say once that there are few training vectors; faiss says so of every clustering, hundreds of times."""
    rotations = [each for each in _rotations(index) if each.pq is None]
    for rotation in rotations:
        # What it makes for its training itself, if nothing is given, made here so that it can be set.
        rotation.own_quantizer = rotation.pq = import_faiss().ProductQuantizer(rotation.d_out, rotation.M, 8)
    most = 0
    for parameters, centroids in _clusterings(index):
        parameters.min_points_per_centroid = 1
        most = max(most, centroids)
    # A single one is the mean of all.
    if most > 1 and vectors < LEAST * most and note is not None:
        note(
            f"factory {factory!r}: trained on {vectors:,} vectors; to find {most:,} centroids well takes "
            f"{LEAST * most:,}, {LEAST} for each"
        )
    try:
        yield
    finally:
        for rotation in rotations:
            rotation.pq = None


def _rotations(index: Any) -> list[Any]:
    """The OPQ matrices in front of an index."""
    faiss = import_faiss()
    chains = [part.chain for part in parts(index) if isinstance(part, faiss.IndexPreTransform)]
    transforms = [faiss.downcast_VectorTransform(chain.at(place)) for chain in chains for place in range(chain.size())]
    return [transform for transform in transforms if isinstance(transform, faiss.OPQMatrix)]


def _clusterings(index: Any) -> Iterator[tuple[Any, int]]:
    """faiss's parameters of every clustering that training does, and how many centroids it finds."""
    faiss = import_faiss()
    inner, quantizers = core(index), [rotation.pq for rotation in _rotations(index)]
    coded = [inner, *flat_codes(index)]
    if isinstance(inner, faiss.IndexIVF):
        yield inner.cp, inner.nlist
        coded.append(faiss.downcast_index(inner.quantizer))
    for part in coded:
        quantizers += [getattr(part, name, None) for name in ("pq", "rq")]
        if hasattr(part, "prq"):
            several = [part.prq.subquantizer(place) for place in range(part.prq.nsplits)]
            quantizers += [faiss.downcast_AdditiveQuantizer(each) for each in several]
    for quantizer in quantizers:
        if isinstance(quantizer, faiss.ProductQuantizer):
            yield quantizer.cp, quantizer.ksub
        elif isinstance(quantizer, faiss.ResidualQuantizer):
            yield quantizer.cp, 1 << quantizer.nbits.at(0)


def sample_vectors(store: EmbeddingStore, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` vectors [count, D] float32 of different rows drawn at random, none of `without`, in the rows' order."""
    return read_rows(store, sample_rows(store.rows, count, seed, without))


def sample_rows(rows: int, count: int, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """`count` different numbers below `rows`, none of `without`, drawn at random and in order, int64."""
    barred = np.empty(0, np.int64) if without is None else without
    # Drawn with as many to spare as may have to be left out, so that no list of all other rows is needed.
    drawn = np.random.default_rng(seed).choice(rows, min(rows, count + len(barred)), replace=False, shuffle=False)
    return np.sort(drawn[~np.isin(drawn, barred)][:count])


def read_rows(store: EmbeddingStore, rows: np.ndarray) -> np.ndarray:
    """The vectors [n, D] float32 of the ascending `rows` [n] of a store."""
    vectors_read = np.empty((len(rows), store.dim), np.float32)
    taken = 0
    for first, vectors in store.shards():
        stop = int(np.searchsorted(rows, first + len(vectors)))
        vectors_read[taken:stop] = vectors[rows[taken:stop] - first]
        taken = stop
    return vectors_read


def trained_part(opened: Index) -> Any:
    """An empty index, with the default search settings, that is trained as `opened` is.

    Raises:
        InputError: faiss cannot read it, or it is not trained as its manifest states: it was made from damaged files.
    """
    index = read_trained(opened.folder / FAISS_FILE)
    set_search_defaults(index)
    stated, found = opened.manifest.field("trained", str), fingerprint(index)
    if found != stated:
        raise InputError(
            f"{opened.folder / FAISS_FILE}: expected the training of sha256 {stated[:12]}… that its manifest states, "
            f"found {found[:12]}…: it was made from a damaged index, or by another version of faiss; build it anew"
        )
    return index


def fingerprint(index: Any) -> str:
    """The sha256 of an empty trained index: two that agree in it encode a vector alike, and can be merged."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexNSG):
        # Nothing sets it before there are vectors.
        inner.nsg.enterpoint = 0
    digest = hashlib.sha256()

    def update(data: bytes) -> int:
        digest.update(data)
        return len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(update))
    return digest.hexdigest()
