"""Choosing a faiss factory string, creating the index, and estimating its memory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import sys
from decimal import ROUND_CEILING, Context
from typing import Any

from index.files import ArgumentError, InputError

# Packages that provide the module faiss; those for GPUs first.
FAISS_PACKAGES = ("faiss-gpu-cuvs", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss", "faiss-cpu")

# Below this number of rows, exhaustive search is fast enough, and exact.
FLAT_ROWS = 200_000

# From this number of rows on, a graph finds the nearest of the many centroids.
GRAPH_ROWS = 2_000_000

# A graph that is built and searched on a GPU, of so many links per vector. faiss has no factory string for it.
CAGRA = re.compile(r"CAGRA(\d+)")
CAGRA_DEGREES = range(8, 257, 2)
CAGRA_STARTS = 1024
"""Rows drawn at random, from the best of which a search of a CAGRA graph starts.

The links of a row go to its neighbors alone, so the graph of clustered vectors has a component for each cluster, and a
search finds only those in which it starts: of 20,000 vectors in 200 clusters, faiss's 32 starts found 0.14 to 0.19 of
the ten nearest, whatever efSearch was; 1,024 found 0.99.
"""

# 10M vectors of 768 dimensions take 31 GB in float32, more than most machines have: from here on, SQ8.
QUANTIZED_ROWS = 10_000_000


def choose(
    rows: int, dim: int, memory_mib: float | None = None, *, even_norms: bool = True, on_disk: bool = False
) -> str:
    """The faiss factory string for `--factory auto`.

    By size: Flat below 200,000 passages, IVF above. The number of centroids follows faiss's guidelines
    (github.com/facebookresearch/faiss/wiki, "Guidelines to choose an index"), with at least 39 training vectors each.
    By memory: the finest codes that fit, of float32 (below 10 million passages), SQfp16, SQ8, and 4-bit PQ with 2, 4
    and 8 dimensions per code. By norms: if they vary, long vectors have high inner products with queries that are far
    from their centroid; IVF misses them, HNSW finds them with less work. On disk: always IVF, the only type whose data
    can stay on disk.

    Args:
        rows: number of passages.
        dim: dimension of their vectors.
        memory_mib: memory budget of the index in MiB; None: unlimited. Ignored with `on_disk`.
        even_norms: whether the norms are about equal, so that inner products are about cosines. Default True.
        on_disk: whether the inverted lists stay on disk. Default False.

    Raises:
        InputError: no index fits the budget.
    """
    lists, code = _lists(rows), "Flat" if rows < QUANTIZED_ROWS else "SQ8"
    if on_disk:
        return f"{lists or _small_ivf(rows)},{code}"
    codes = [code] if memory_mib is None else ["Flat", "SQfp16", "SQ8", *_product_codes(dim)]
    choices = [f"{lists},{code}" if lists else code for code in codes]
    if lists and not even_norms and rows < QUANTIZED_ROWS:
        choices = ["HNSW32", "HNSW32_SQfp16", "HNSW32_SQ8", *choices]
    if memory_mib is None:
        return choices[0]
    for factory in choices:
        if memory(factory, rows, dim) <= memory_mib * 2**20:
            return factory
    raise _over_budget(memory_mib, factory, rows, dim)


def reason_of_choice(factory: str, rows: int, dim: int, *, on_disk: bool = False) -> str:
    """Why `choose` returned `factory` for `rows` vectors of `dim` dimensions, in a few words."""
    reached = [limit for limit in (FLAT_ROWS, GRAPH_ROWS, QUANTIZED_ROWS) if rows >= limit]
    reasons = [f"{reached[-1]:,} passages or more" if reached else f"fewer than {FLAT_ROWS:,} passages"]
    if on_disk:
        reasons.append("an index on disk")
    else:
        if factory.startswith("HNSW"):
            reasons.append("vectors of uneven length")
        if factory not in (choose(rows, dim), choose(rows, dim, even_norms=False)):
            reasons.append("the memory budget")
    return " and ".join(reasons)


def _over_budget(memory_mib: float, factory: str, rows: int, dim: int) -> InputError:
    # Rounded up, so that the suggested budget is accepted.
    least = Context(prec=3, rounding=ROUND_CEILING).create_decimal(memory(factory, rows, dim) / 2**20)
    return ArgumentError(
        "memory_budget_mib",
        f"expected at least {least:,f} for {rows:,} passages of {dim} dimensions ({factory}), "
        f"found {memory_mib:g}; lists on disk take less memory",
    )


def _lists(rows: int) -> str:
    if rows < FLAT_ROWS:
        return ""
    if rows < GRAPH_ROWS:
        return "IVF4096"
    return "IVF16384_HNSW32" if rows < QUANTIZED_ROWS else "IVF65536_HNSW32"


def _small_ivf(rows: int) -> str:
    """IVF for fewer rows than `choose` uses it for: the largest power of two with 39 training vectors per centroid."""
    return f"IVF{1 << max(0, (rows // 39).bit_length() - 1)}"


def _product_codes(dim: int) -> list[str]:
    """Factory strings of 4-bit PQ with 2, 4 and 8 dimensions per code.

    The number of codes must divide `dim`, and faiss requires at least 2.
    """
    wanted = [dim // numbers for numbers in (2, 4, 8)]
    counts = [max((m for m in range(2, most + 1) if dim % m == 0), default=0) for most in wanted]
    return [f"PQ{count}x4fs" for count in dict.fromkeys(counts) if count]


def explain(factory: str, rows: int, dim: int, memory_mib: float | None = None) -> str:
    """One line that describes `factory` for `rows` vectors of `dim` dimensions, and its memory.

    Raises:
        InputError: `factory` is not a faiss factory string, does not fit `dim`, or takes more than `memory_mib`.
    """
    each = bytes_per_vector(factory, dim)
    size = memory(factory, rows, dim) / 2**20
    if memory_mib is not None and size > memory_mib:
        raise _over_budget(memory_mib, factory, rows, dim)
    budget = "" if memory_mib is None else f", within {memory_mib:,g} MiB"
    size_text = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
    return f"{factory}: {_describe(factory)}; {each} bytes a vector, {size_text} MiB for {rows:,} passages{budget}"


def _describe(factory: str) -> str:
    if factory == "Flat":
        return "compares with every passage, exact"
    if "IVF" in factory:
        return "compares with the passages of the nearest centroids, approximate"
    if CAGRA.fullmatch(factory):
        return "walks a graph of near passages on a GPU, approximate"
    if re.search(r"HNSW|NSG", factory):
        return "walks a graph of near passages, approximate"
    return "compares with the codes of every passage, approximate"


def memory(factory: str, rows: int, dim: int) -> int:
    """Memory of an index of `rows` vectors in bytes, including centroids and their graph.

    Raises:
        InputError: `factory` is not a faiss factory string, or does not fit `dim`.
    """
    faiss = import_faiss()
    outer = make(factory, dim)
    ivf = faiss.try_extract_index_ivf(outer)
    centroids = 0 if ivf is None else ivf.nlist * _bytes_each(ivf.quantizer)
    return rows * bytes_per_vector(factory, dim) + centroids


def has_even_norms(vectors: Any) -> bool:
    """Whether the norms of `vectors` [n, D] are about equal: the 95th percentile is at most 1.2 times the 5th.

    Beyond that, IVF was measured to lose recall; see docs/design/indexes.md.
    """
    import numpy as np

    short, long = np.percentile(np.linalg.norm(vectors, axis=1), [5, 95])
    return bool(long <= 1.2 * short)


def make(factory: str, dim: int) -> Any:
    """Create an empty faiss index for inner product. Besides faiss's factory strings, `CAGRA64` is understood.

    Raises:
        InputError: `factory` is not a faiss factory string, does not fit `dim`, does not support inner product, or
            faiss is not installed.
    """
    faiss = import_faiss()
    if "IDMap" in factory:
        raise InputError(f"factory {factory!r}: expected one without IDMap, because the index keeps the ids itself")
    if found := CAGRA.fullmatch(factory):
        return _make_cagra(factory, int(found[1]), dim)
    try:
        # faiss's parser accepts counts of 0, and some of them then crash the process.
        if re.search(r"(?<![0-9.])0+(?![0-9.])", factory):
            raise RuntimeError("a count of 0")
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"factory {factory!r}: expected a faiss factory string for inner product and {dim} dimensions, such as "
            f"'Flat', 'IVF4096,Flat', 'HNSW32', found: {reason(error)}"
        ) from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise InputError(f"factory {factory!r}: expected one of inner product, found one of Euclidean distance")
    return index


def _make_cagra(factory: str, degree: int, dim: int) -> Any:
    faiss = import_faiss()
    if degree not in CAGRA_DEGREES:
        raise InputError(
            f"factory {factory!r}: expected an even number of links from {CAGRA_DEGREES[0]} to {CAGRA_DEGREES[-1]}, "
            "such as CAGRA64"
        )
    if not hasattr(faiss, "IndexHNSWCagra"):
        raise InputError(f"factory {factory!r}: expected faiss 1.10 or newer, found {faiss.__version__}")
    index = faiss.IndexHNSWCagra(dim, degree // 2, faiss.METRIC_INNER_PRODUCT)
    as_cagra(index)
    return index


def as_cagra(graph: Any) -> None:
    """Make an IndexHNSWCagra a graph of CAGRA's own. Both properties are saved in the index file."""
    graph.base_level_only = True
    graph.num_base_level_search_entrypoints = CAGRA_STARTS


def is_cagra(index: Any) -> bool:
    """Whether a faiss index is a graph of CAGRA's own, with a single level."""
    kind = getattr(import_faiss(), "IndexHNSWCagra", None)
    return kind is not None and isinstance(index, kind) and bool(index.base_level_only)


def bytes_per_vector(factory: str, dim: int) -> int:
    """Bytes per vector in memory and on disk: the code, and the id and graph links if there are any.

    Raises:
        InputError: `factory` is not a faiss factory string, or does not fit `dim`.
    """
    # Keep a reference: the inner indexes are views that do not keep the outer one alive.
    outer = make(factory, dim)
    try:
        return _bytes_each(outer)
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: its bytes per vector are not known: {reason(error)}") from None


def _bytes_each(part: Any) -> int:
    faiss = import_faiss()
    index = faiss.downcast_index(part)
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_each(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _bytes_each(index.base_index) + _bytes_each(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        # 4 bytes per link: 2M links on the base level, and on average one more per vector on the upper levels.
        return _bytes_each(index.storage) + 4 * (index.hnsw.nb_neighbors(0) + 1)
    if isinstance(index, faiss.IndexNSG):
        return _bytes_each(index.storage) + 4 * index.nsg.R
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + 8
    return int(index.sa_code_size())


def reason(error: Exception) -> str:
    """The message of a faiss error in one line, without the source location."""
    return re.sub(r"^.*? at \S+:\d+: ", "", " ".join(str(error).split()))


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        InputError: faiss is not installed, is installed twice, or cannot be loaded.
    """
    # torch must be imported before faiss: both load an OpenMP runtime, and a GPU build fails in the other order.
    importlib.import_module("torch")
    if "faiss" not in sys.modules:
        check_one_faiss()
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise InputError(f"faiss cannot be loaded: {error}") from None
        raise InputError("faiss is not installed: pip install faiss-cpu") from None
    except (ImportError, RuntimeError) as error:
        raise InputError(f"faiss cannot be loaded: {' '.join(str(error).split())}") from None
    return faiss


def check_one_faiss() -> None:
    """Check that a single package provides the module faiss.

    All packages of faiss install the same folder, so the one installed last has overwritten files of the other, and
    uninstalling either removes files of both.

    Raises:
        InputError: two or more are installed; the message has the command that mends it.
    """
    found: dict[str, str] = {}
    for name in FAISS_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if len(found) < 2:
        return
    # Whoever installed one for GPUs wanted it; faiss-cpu comes as a dependency.
    wanted = next(name for name in FAISS_PACKAGES if name in found)
    packages = " and ".join(f"{name} {version}" for name, version in found.items())
    raise InputError(
        f"faiss: expected one package of it, found {packages}, which overwrite each other's files: "
        f"pip uninstall -y {' '.join(found)} && pip install {wanted}"
    )
