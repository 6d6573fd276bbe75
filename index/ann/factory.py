"""Which kind of index to take, how it searches, and what a vector costs in it."""

from __future__ import annotations

import importlib
import re
from decimal import ROUND_CEILING, Context
from typing import Any

from index.files import InputError

# Below this, comparing with every passage is fast enough, and exact.
FLAT_ROWS = 200_000

# From here on there are so many lists that a graph finds the nearest.
GRAPH_ROWS = 2_000_000

# 10M vectors of 768 dimensions are 31 GB in float32, more than most machines hold: from there on, one byte a number.
QUANTISED_ROWS = 10_000_000


def choose(
    rows: int, dim: int, memory_mib: float | None = None, *, even_norms: bool = True, on_disk: bool = False
) -> str:
    """The faiss factory string that `auto` stands for with so many passages.

    By size: all are compared below 200,000, and the nearest lists above. The numbers of centroids follow faiss's own
    guideline (github.com/facebookresearch/faiss/wiki, "Guidelines to choose an index"): each gets the 39 training
    vectors or more that its k-means asks for. By memory: the finest code that fits, of float32 (below 10 million),
    float16, one byte a number, and 4-bit PQ of two, four and eight numbers a code. By metric: where lengths differ,
    the longest vectors are near to queries that their list is far from, and a graph finds them with less work. On disk:
    always lists, for nothing else can stay there, and whatever memory they would take.

    Args:
        rows: passages.
        dim: of their vectors.
        memory_mib: most that the index may take in memory, in MiB.
        even_norms: whether the vectors are about equally long, so that their inner products are about cosines.
        on_disk: whether the index is to stay on disk.

    Raises:
        InputError: none fits.
    """
    lists, code = _lists(rows), "Flat" if rows < QUANTISED_ROWS else "SQ8"
    if on_disk:
        return f"{lists or _few_lists(rows)},{code}"
    codes = [code] if memory_mib is None else ["Flat", "SQfp16", "SQ8", *_product_codes(dim)]
    choices = [f"{lists},{code}" if lists else code for code in codes]
    if lists and not even_norms and rows < QUANTISED_ROWS:
        choices = ["HNSW32", "HNSW32_SQfp16", "HNSW32_SQ8", *choices]
    if memory_mib is None:
        return choices[0]
    for factory in choices:
        if memory(factory, rows, dim) <= memory_mib * 2**20:
            return factory
    raise _beyond(memory_mib, factory, rows, dim)


def reason_of_choice(factory: str, rows: int, dim: int, *, on_disk: bool = False) -> str:
    """What made `choose` take `factory` for `rows` vectors of `dim` dimensions, in a few words."""
    reached = [limit for limit in (FLAT_ROWS, GRAPH_ROWS, QUANTISED_ROWS) if rows >= limit]
    reasons = [f"{reached[-1]:,} passages or more" if reached else f"fewer than {FLAT_ROWS:,} passages"]
    if on_disk:
        reasons.append("an index on disk")
    else:
        if factory.startswith("HNSW"):
            reasons.append("vectors of uneven length")
        if factory not in (choose(rows, dim), choose(rows, dim, even_norms=False)):
            reasons.append("the memory budget")
    return " and ".join(reasons)


def _beyond(memory_mib: float, factory: str, rows: int, dim: int) -> InputError:
    # Rounded up, so that who gives what is asked for is not refused again.
    least = Context(prec=3, rounding=ROUND_CEILING).create_decimal(memory(factory, rows, dim) / 2**20)
    return InputError(
        f"--memory-budget-mib: expected at least {least:,f} for {rows:,} passages of {dim} dimensions ({factory}), "
        f"found {memory_mib:g}; --on-disk holds less at once"
    )


def _lists(rows: int) -> str:
    if rows < FLAT_ROWS:
        return ""
    if rows < GRAPH_ROWS:
        return "IVF4096"
    return "IVF16384_HNSW32" if rows < QUANTISED_ROWS else "IVF65536_HNSW32"


def _few_lists(rows: int) -> str:
    """For less than lists are worth: as many, a power of two, as have their 39 training vectors each."""
    return f"IVF{1 << max(0, (rows // 39).bit_length() - 1)}"


def _product_codes(dim: int) -> list[str]:
    """4-bit PQ of fewer and fewer codes; their number must divide the dimensions, and faiss wants two or more."""
    wanted = [dim // numbers for numbers in (2, 4, 8)]
    counts = [max((m for m in range(2, most + 1) if dim % m == 0), default=0) for most in wanted]
    return [f"PQ{count}x4fs" for count in dict.fromkeys(counts) if count]


def explain(factory: str, rows: int, dim: int, memory_mib: float | None = None) -> str:
    """One line that says what `factory` means for `rows` vectors of `dim` dimensions, and how much memory they take.

    Raises:
        InputError: `factory` is no faiss factory string, does not fit `dim`, or takes more than `memory_mib`.
    """
    each = bytes_per_vector(factory, dim)
    size = memory(factory, rows, dim) / 2**20
    if memory_mib is not None and size > memory_mib:
        raise _beyond(memory_mib, factory, rows, dim)
    budget = "" if memory_mib is None else f", within {memory_mib:,g} MiB"
    size_text = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
    return f"{factory}: {_why(factory)}; {each} bytes a vector, {size_text} MiB for {rows:,} passages{budget}"


def _why(factory: str) -> str:
    if factory == "Flat":
        return "compares with every passage, exact"
    if "IVF" in factory:
        return "compares with the passages of the nearest centroids, approximate"
    if re.search(r"HNSW|NSG", factory):
        return "walks a graph of near passages, approximate"
    return "compares with the codes of every passage, approximate"


def memory(factory: str, rows: int, dim: int) -> int:
    """Bytes that an index of `rows` vectors takes in memory: theirs, and those of its centroids and their graph.

    Raises:
        InputError: `factory` is no faiss factory string, or does not fit `dim`.
    """
    faiss = import_faiss()
    whole = make(factory, dim)
    ivf = faiss.try_extract_index_ivf(whole)
    centroids = 0 if ivf is None else ivf.nlist * _bytes_each(ivf.quantizer)
    return rows * bytes_per_vector(factory, dim) + centroids


def has_even_norms(vectors: Any) -> bool:
    """Whether `vectors` [n, D], a sample of a store, are about equally long: the middle 90 % within a fifth.

    Beyond that, lists were measured to lose recall: index/README.md has the figures.
    """
    import numpy as np

    short, long = np.percentile(np.linalg.norm(vectors, axis=1), [5, 95])
    return bool(long <= 1.2 * short)


def make(factory: str, dim: int) -> Any:
    """An empty faiss index of inner product.

    Raises:
        InputError: `factory` is no faiss factory string, does not fit `dim`, cannot rank by inner product, or faiss
            is not installed.
    """
    faiss = import_faiss()
    if "IDMap" in factory:
        raise InputError(f"factory {factory!r}: expected one without IDMap, for the index keeps the ids itself")
    try:
        # Counts of 0 pass faiss's parser, and some then end the whole process.
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


def bytes_per_vector(factory: str, dim: int) -> int:
    """Bytes that one more vector takes in memory and on disk: its code, and its id and links where there are any.

    Raises:
        InputError: `factory` is no faiss factory string, or does not fit `dim`.
    """
    # Named, so that it lives while its parts are looked at: they are views into it, not objects of their own.
    whole = make(factory, dim)
    try:
        return _bytes_each(whole)
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: its bytes a vector are not known: {reason(error)}") from None


def _bytes_each(part: Any) -> int:
    faiss = import_faiss()
    index = faiss.downcast_index(part)
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_each(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _bytes_each(index.base_index) + _bytes_each(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        # 4 bytes a link: twice M on the ground level, and M more for one vector in M.
        return _bytes_each(index.storage) + 4 * (index.hnsw.nb_neighbors(0) + 1)
    if isinstance(index, faiss.IndexNSG):
        return _bytes_each(index.storage) + 4 * index.nsg.R
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + 8
    return int(index.sa_code_size())


def reason(error: Exception) -> str:
    """What a faiss error says, in one line and without the place in its source."""
    return re.sub(r"^.*? at \S+:\d+: ", "", " ".join(str(error).split()))


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        InputError: it is not installed.
    """
    # Before faiss: the two bring an OpenMP each, and with a GPU build the order decides whether it loads.
    importlib.import_module("torch")
    try:
        import faiss
    except ImportError:
        raise InputError("faiss is not installed: pip install faiss-cpu") from None
    return faiss
