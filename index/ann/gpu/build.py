"""Building indexes on GPUs. The result is a CPU index, in the same file format.

k-means and the assignment of vectors to inverted lists, which take most of the time, run on all GPUs; the CPU computes
the codes from the same centroids. With cuVS, CAGRA builds graphs (Ootomo et al., "CAGRA: Highly Parallel Graph
Construction and Approximate Nearest Neighbor Search for GPUs", arXiv:2308.15136): those of HNSW…, which get upper
levels and are searched on a CPU, and those of CAGRA…, which have one level and are searched on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from index.ann.factory import as_cagra, import_faiss, is_cagra
from index.ann.gpu.support import INSTEAD, check_memory
from index.ann.settings import core
from index.files import InputError


@contextlib.contextmanager
def cluster_on_gpus(index: Any) -> Iterator[None]:
    """Run the k-means of an IVF index on all GPUs within this context."""
    faiss = import_faiss()
    inner = core(index)
    if not isinstance(inner, faiss.IndexIVF):
        yield
        return
    on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(inner.d, inner.metric_type))
    inner.clustering_index = on_gpus
    try:
        yield
    finally:
        inner.clustering_index = None
        # faiss took ownership of it and would never free its GPU memory.
        on_gpus.thisown = True


def add_function(index: Any) -> Callable[[np.ndarray], None]:
    """A function that adds vectors [n, D] float32 to a trained index, assigning them to inverted lists on all GPUs.

    A quantizer with an HNSW graph is replaced by its centroids: the GPUs compare with all of them and find the nearest
    exactly. Fast-scan codes, graphs and flat codes are added by the CPU alone.
    """
    faiss = import_faiss()
    inner = core(index)
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    # Exact types: subclasses may store their codes differently.
    if type(inner) not in kinds:
        return lambda vectors: index.add(vectors)
    quantizer = faiss.downcast_index(inner.quantizer)
    centroids = quantizer.storage if isinstance(quantizer, faiss.IndexHNSW) else quantizer
    on_gpus = faiss.index_cpu_to_all_gpus(faiss.downcast_index(centroids))
    return lambda vectors: _add(index, vectors, lambda some: on_gpus.search(some, 1)[1])


def _add(index: Any, vectors: np.ndarray, lists_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Like `index.add`, but `lists_of` assigns vectors [n, D] to inverted lists (int64 [n, 1])."""
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


def check_cagra(factory: str) -> None:
    """Check that an index of CAGRA's own can be built: it cannot be built without a GPU.

    Raises:
        InputError: this faiss has no cuVS, or finds no GPU.
    """
    faiss = import_faiss()
    expected = f"factory {factory!r}: expected a faiss with cuVS ({INSTEAD}) and a GPU"
    if not hasattr(faiss, "GpuIndexCagra"):
        raise InputError(f"{expected}, found faiss {faiss.__version__} without cuVS; HNSW32 is a graph for CPUs")
    if faiss.get_num_gpus() == 0:
        raise InputError(f"{expected}, faiss found no GPU; HNSW32 is a graph for CPUs")


def can_build_graph(index: Any) -> bool:
    """Whether `build_graph` can build an index like the empty `index`: HNSW of float32 vectors, and faiss with cuVS."""
    faiss = import_faiss()
    return hasattr(faiss, "GpuIndexCagra") and type(faiss.downcast_index(index)) is faiss.IndexHNSWFlat


def build_graph(like: Any, pieces: Iterable[np.ndarray], rows: int, added: Callable[[int], None]) -> Any:
    """Build a graph with CAGRA on a GPU, whose memory must hold all vectors.

    Args:
        like: an empty HNSW or CAGRA index, which gives the dimension and the links per vector of the base level.
        pieces: vectors [n, D] float32.
        rows: their total number.
        added: called with the number of rows just read.

    Returns:
        An IndexHNSWCagra, with upper levels if `like` is an HNSW index.

    Raises:
        NotOnGpu: the free memory of the GPU is too small.
    """
    faiss = import_faiss()
    degree = like.hnsw.nb_neighbors(0)
    # The vectors, a copy in half precision, and the graph before and after it is pruned, twice.
    check_memory(0, rows * (6 * like.d + 24 * degree), f"a graph of {rows:,} vectors")
    vectors = np.empty((rows, like.d), np.float32)
    start = 0
    for piece in pieces:
        vectors[start : start + len(piece)] = piece
        start += len(piece)
        added(len(piece))
    config = faiss.GpuIndexCagraConfig()
    config.graph_degree = degree
    config.intermediate_graph_degree = 2 * degree
    # Adds links between the components of the graph, one for each cluster of the vectors.
    config.guarantee_connectivity = True
    on_gpus = faiss.GpuIndexCagra(faiss.StandardGpuResources(), like.d, faiss.METRIC_INNER_PRODUCT, config)
    on_gpus.train(vectors)
    if not is_cagra(like):
        return faiss.index_gpu_to_cpu(on_gpus)
    graph = faiss.IndexHNSWCagra()
    as_cagra(graph)
    on_gpus.copyTo(graph)
    # copyTo reads the first property and may reset the second.
    as_cagra(graph)
    return graph
