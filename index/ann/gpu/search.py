"""Searching a faiss index on GPUs.

The index stays in main memory too, where it answers what the GPUs cannot: filters, and more than 2,048 results. Scores
are computed in float32 from the same codes, as on the CPU, and differ from the CPU's by rounding only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from index.ann.factory import CAGRA_STARTS, import_faiss, is_cagra, reason
from index.ann.gpu.support import NotOnGpu, check_support, choose_gpus
from index.ann.settings import Settings, core, index_layers

Spread = Literal["auto", "shards", "replicas"]

MAX_RESULTS = 2048
"""Maximum number of results, and of inverted lists, per query that faiss's GPU kernels can select."""
MAX_ITOPK = 1024
"""Longest candidate list of a search of a CAGRA graph that tuning tries."""
# faiss stores an inverted list in groups of this many vectors, in memory of its own.
GROUP = 32
BYTES_PER_LIST = 1024
# Rows of a graph whose links are checked at once.
CHECKED_ROWS = 2**16


class GpuIndex:
    """A copy of a faiss index on GPUs. Created by `to_gpus`.

    Attributes:
        gpus: numbers of the GPUs.
        spread: "shards" if each GPU has a part of the index, "replicas" if each has all of it.
        device: the GPUs in words.
    """

    def __init__(self, index: Any, gpus: Sequence[int], spread: Literal["shards", "replicas"]) -> None:
        faiss = import_faiss()
        self.gpus, self.spread = list(gpus), spread
        names = ", ".join(f"cuda:{gpu}" for gpu in self.gpus)
        self.device = f"{names} ({spread})" if len(self.gpus) > 1 else names
        # What was moved refers to parts of the index in main memory: transforms and refinements.
        self._source = index
        self._rows = index.ntotal
        # faiss's resources of a GPU serve one thread at a time.
        self._lock = threading.Lock()
        self._resources = [faiss.StandardGpuResources() for _ in self.gpus]
        self._refinements: list[Any] = []
        self._index = self._moved(index)
        self.apply(Settings.of(index))

    @property
    def max_results(self) -> int:
        """Maximum number of results per query."""
        return int(MAX_RESULTS / max(1.0, self._k_factor))

    def apply(self, settings: Settings) -> None:
        """Set search-time parameters.

        Raises:
            NotOnGpu: a parameter is larger than GPUs support.
        """
        faiss = import_faiss()
        self._k_factor = settings.k_factor or 1.0
        for refinement in self._refinements:
            refinement.k_factor = self._k_factor
        if settings.nprobe is not None:
            if settings.nprobe > MAX_RESULTS:
                raise NotOnGpu(f"GPUs visit at most {MAX_RESULTS:,} lists per query, expected nprobe {settings.nprobe}")
            faiss.GpuParameterSpace().set_index_parameter(self._core, "nprobe", settings.nprobe)
        if settings.ef_search is not None:
            self._ef_search = settings.ef_search

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of queries [Q, D] float32, like `search` of a faiss index.

        Returns:
            scores [Q, k] float32, descending, and rows [Q, k] int64, padded with row -1.

        Raises:
            RuntimeError: faiss cannot search, for example because the memory of a GPU is exhausted.
        """
        with self._lock:
            if not is_cagra(core(self._source)):
                return self._index.search(queries, k)
            parameters = import_faiss().SearchParametersCagra()
            parameters.itopk_size = max(self._ef_search, k)
            # cuVS starts from the candidate list and the links of one row, each the best of so many random rows.
            starts = parameters.itopk_size + core(self._source).hnsw.nb_neighbors(0)
            parameters.num_random_samplings = -(-CAGRA_STARTS // starts)
            scores, rows = self._index.search(queries, k, params=parameters)
        # cuVS marks missing results by the largest number of 31 or 32 bits.
        rows[rows >= max(self._rows, 2**31 - 1)] = -1
        return scores, rows

    def _moved(self, part: Any) -> Any:
        """Copy `part` to the GPUs. Linear transforms and refinements stay on the CPU: they are a small part of the
        work, and faiss has no refinements on GPUs."""
        faiss = import_faiss()
        part = faiss.downcast_index(part)
        if isinstance(part, faiss.IndexPreTransform):
            outer = faiss.IndexPreTransform(self._moved(part.index))
            for number in reversed(range(part.chain.size())):
                outer.prepend_transform(part.chain.at(number))
            return outer
        if isinstance(part, faiss.IndexRefine):
            outer = faiss.IndexRefine(self._moved(part.base_index), part.refine_index)
            self._refinements.append(outer)
            return outer
        options = faiss.GpuMultipleClonerOptions()
        options.shard = self.spread == "shards"
        options.indicesOptions = faiss.INDICES_64_BIT
        with _centroids_without_graph(part):
            self._core = faiss.index_cpu_to_gpu_multiple_py(self._resources, part, options, self.gpus)
        return self._core


def to_gpus(index: Any, device: str, spread: Spread = "auto") -> GpuIndex:
    """Copy a faiss index to GPUs.

    Args:
        index: the faiss index, in main memory or memory-mapped.
        device: "cuda:1" is one GPU, "cuda" all of them.
        spread: how several GPUs are used. "shards": each holds a part of the index, and all search for every query.
            "replicas": each holds all of it, and searches for a part of the queries. Default: "auto", one GPU if it
            holds the index, else shards.

    Raises:
        NotOnGpu: this faiss has no GPU support, there is no such GPU, GPUs do not support this type of index, or their
            free memory is too small.
    """
    check_support()
    _check_type(index)
    gpus, chosen = choose_gpus(device, spread, bytes_on_gpu(index))
    if is_cagra(core(index)) and len(gpus) > 1:
        # faiss would make a copy on the CPU.
        raise NotOnGpu(f"a graph of CAGRA is searched on one GPU, expected it to fit on cuda:0, found {chosen}")
    try:
        return GpuIndex(index, gpus, chosen)
    except RuntimeError as error:
        raise NotOnGpu(f"faiss cannot copy it: {reason(error)}") from None


def bytes_on_gpu(index: Any) -> int:
    """The memory of an index on a GPU, in bytes, without faiss's workspace."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexIVF):
        lists = inner.nlist * (GROUP * inner.code_size + BYTES_PER_LIST + 4 * inner.d)
        return int(inner.ntotal * (inner.code_size + 8) + lists)
    if is_cagra(inner):
        return int(inner.ntotal * (4 * (inner.d + 3) + 4 * inner.hnsw.nb_neighbors(0)))
    return int(inner.ntotal * inner.d * 4)


def _check_type(index: Any) -> None:
    """Check that GPUs can search this type of index.

    Raises:
        NotOnGpu: they cannot.
    """
    faiss = import_faiss()
    for layer in index_layers(index):
        if isinstance(layer, faiss.IndexIVF) and layer.nprobe > MAX_RESULTS:
            raise NotOnGpu(f"GPUs visit at most {MAX_RESULTS:,} lists per query, expected nprobe {layer.nprobe}")
    inner = core(index)
    kinds = (
        faiss.IndexFlat,
        faiss.IndexFlatIP,
        faiss.IndexIVFFlat,
        faiss.IndexIVFScalarQuantizer,
        faiss.IndexIVFPQ,
    )
    # Exact types: subclasses may store their codes differently.
    if type(inner) in kinds:
        return
    if not is_cagra(inner):
        raise NotOnGpu(
            f"GPUs search Flat, IVF…,Flat, IVF…,SQ…, IVF…,PQ… (of 8 bits) and CAGRA…, found {type(inner).__name__}"
        )
    if not hasattr(faiss, "GpuIndexCagra"):
        raise NotOnGpu("CAGRA… needs a faiss with cuVS (faiss-gpu-cuvs)")
    _check_links(inner)


def _check_links(graph: Any) -> None:
    """Check that every row of a graph has all of its links on the base level: cuVS would read invalid memory.

    Raises:
        NotOnGpu: a link is missing or invalid.
    """
    faiss = import_faiss()
    links, starts = graph.hnsw.neighbors, graph.hnsw.offsets
    numbers = faiss.rev_swig_ptr(links.data(), links.size())
    # Rows may have links on upper levels, too, behind those of the base level.
    firsts = faiss.rev_swig_ptr(starts.data(), starts.size())[: graph.ntotal]
    columns = np.arange(graph.hnsw.nb_neighbors(0), dtype=np.uint64)
    for begin in range(0, graph.ntotal, CHECKED_ROWS):
        some = numbers[firsts[begin : begin + CHECKED_ROWS, None] + columns]
        if some.min() < 0 or some.max() >= graph.ntotal:
            raise NotOnGpu("expected a graph with all of its links, as CAGRA builds it")


@contextlib.contextmanager
def _centroids_without_graph(part: Any) -> Iterator[None]:
    """Within this context, an IVF index finds its nearest lists without a graph, which GPUs do not have.

    They compare a query with all centroids instead, and find the nearest exactly.
    """
    faiss = import_faiss()
    quantizer = faiss.downcast_index(part.quantizer) if isinstance(part, faiss.IndexIVF) else None
    if not isinstance(quantizer, faiss.IndexHNSW):
        yield
        return
    graph = part.quantizer
    part.quantizer = faiss.downcast_index(quantizer.storage)
    try:
        yield
    finally:
        part.quantizer = graph
