"""Building indexes on GPUs, where faiss knows some. What comes out is an index for processors, in the same file.

Clustering and finding the list of each vector, the two that take the time, are done there; codes are made by the
processor, from the same centroids. With cuVS a graph is built there too, by CAGRA (Ootomo and others, CAGRA: highly
parallel graph construction and approximate nearest neighbor search for GPUs, arXiv 2308.15136).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import core
from index.files import InputError

INSTEAD = "pip install faiss-gpu-cu12 in place of faiss-cpu"


def check_gpus() -> None:
    """Refuse to go on where there is nothing to go on with.

    Raises:
        InputError: this faiss knows no GPU, or the machine has none.
    """
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise InputError(f"--gpu: expected a faiss with GPU support: {INSTEAD}")
    if faiss.get_num_gpus() == 0:
        raise InputError("--gpu: expected a GPU, faiss found none")


@contextlib.contextmanager
def clustering(index: Any) -> Iterator[None]:
    """Let the k-means of an inverted file run on all GPUs."""
    faiss = import_faiss()
    inner = core(index)
    if not isinstance(inner, faiss.IndexIVF):
        yield
        return
    there = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(inner.d, inner.metric_type))
    inner.clustering_index = there
    try:
        yield
    finally:
        inner.clustering_index = None
        # By then faiss had been given it, and would never free the memory of the GPUs.
        there.thisown = True


def adder(index: Any) -> Callable[[np.ndarray], None]:
    """What adds vectors [n, D] float32 to a trained `index`, their lists found on all GPUs.

    Where the centroids have a graph, the GPUs compare with all of them and find the nearest, as the graph nearly does.
    Codes packed for fast scan, graphs and flat codes are added by the processor alone.
    """
    faiss = import_faiss()
    inner = core(index)
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    # Those derived from them may store otherwise.
    if type(inner) not in kinds:
        return lambda vectors: index.add(vectors)
    quantizer = faiss.downcast_index(inner.quantizer)
    centroids = quantizer.storage if isinstance(quantizer, faiss.IndexHNSW) else quantizer
    there = faiss.index_cpu_to_all_gpus(faiss.downcast_index(centroids))
    return lambda vectors: _add(index, vectors, lambda some: there.search(some, 1)[1])


def _add(index: Any, vectors: np.ndarray, lists_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """`index.add`, but that `lists_of` says which list a vector belongs to: int64 [n, 1]."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    if isinstance(part, faiss.IndexPreTransform):
        for number in range(part.chain.size()):
            vectors = faiss.downcast_VectorTransform(part.chain.at(number)).apply(vectors)
        _add(part.index, vectors, lists_of)
        part.ntotal = part.index.ntotal
    elif isinstance(part, faiss.IndexRefine):
        _add(part.base_index, vectors, lists_of)
        part.refine_index.add(vectors)
        part.ntotal = part.refine_index.ntotal
    else:
        lists = np.ascontiguousarray(lists_of(vectors), np.int64)
        part.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))


def makes_graph(index: Any) -> bool:
    """Whether `graph` can make an index like the empty `index`: HNSW of float32 vectors, by a faiss with cuVS."""
    faiss = import_faiss()
    return hasattr(faiss, "GpuIndexCagra") and type(faiss.downcast_index(index)) is faiss.IndexHNSWFlat


def graph(like: Any, pieces: Iterable[np.ndarray], rows: int, added: Callable[[int], None]) -> Any:
    """A graph of vectors, built by CAGRA on a GPU that has to hold them all, with the links of `like`'s ground level.

    Args:
        like: an empty HNSW index.
        pieces: vectors [n, D] float32, `rows` in all.
        rows: how many.
        added: called with the number of rows each time some were read.
    """
    faiss = import_faiss()
    vectors = np.empty((rows, like.d), np.float32)
    start = 0
    for piece in pieces:
        vectors[start : start + len(piece)] = piece
        start += len(piece)
        added(len(piece))
    config = faiss.GpuIndexCagraConfig()
    config.graph_degree = like.hnsw.nb_neighbors(0)
    config.intermediate_graph_degree = 2 * config.graph_degree
    there = faiss.GpuIndexCagra(faiss.StandardGpuResources(), like.d, faiss.METRIC_INNER_PRODUCT, config)
    there.train(vectors)
    return faiss.index_gpu_to_cpu(there)
