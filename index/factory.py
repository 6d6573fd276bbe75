"""Which kind of index to take, how it searches, and what a vector costs in it."""

from __future__ import annotations

import importlib
import re
from typing import Any

from index.files import InputError

# Below this, comparing with every passage is fast enough, and exact.
FLAT_ROWS = 200_000

# 10M vectors of 768 dimensions are 31 GB in float32, more than most machines hold: from there on, one byte a number.
QUANTISED_ROWS = 10_000_000


def choose(rows: int) -> str:
    """The faiss factory string that `auto` stands for with so many passages.

    The numbers of centroids follow faiss's own guideline (github.com/facebookresearch/faiss/wiki, "Guidelines to
    choose an index"): each gets the 39 training vectors or more that its k-means asks for.
    """
    if rows < FLAT_ROWS:
        return "Flat"
    if rows < 2_000_000:
        return "IVF4096,Flat"
    if rows < QUANTISED_ROWS:
        return "IVF16384_HNSW32,Flat"
    return "IVF65536_HNSW32,SQ8"


def explain(factory: str, rows: int, dim: int) -> str:
    """One line that says what `factory` means for `rows` vectors of `dim` dimensions, and how much memory they take.

    Raises:
        InputError: `factory` is no faiss factory string, or does not fit `dim`.
    """
    each = bytes_per_vector(factory, dim)
    if factory == "Flat":
        why = "compares with every passage, exact"
    elif factory.startswith("IVF"):
        why = "compares with the passages of the nearest centroids, approximate"
    else:
        why = "as asked for"
    size = each * rows / 2**20
    size_text = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
    return f"{factory}: {why}; {each} bytes a vector, {size_text} MiB for {rows:,} passages"


def make(factory: str, dim: int) -> Any:
    """An empty faiss index of inner product.

    Raises:
        InputError: `factory` is no faiss factory string, does not fit `dim`, cannot rank by inner product, or faiss
            is not installed.
    """
    faiss = import_faiss()
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
        raise InputError(f"factory {factory!r}: expected one that ranks by inner product, found another metric")
    return index


def set_search_defaults(index: Any) -> None:
    """Let a search look at enough of the index: with faiss's own defaults (1 list, no reserve) it finds far too little.

    They are saved in the faiss file, so that plain faiss searches alike.
    """
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    while isinstance(part, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(part, faiss.IndexRefine):
            part.k_factor = 4.0
            part = faiss.downcast_index(part.base_index)
        else:
            part = faiss.downcast_index(part.index)
    if isinstance(part, faiss.IndexIVF):
        part.nprobe = min(part.nlist, max(16, part.nlist // 64))
    elif isinstance(part, faiss.IndexHNSW):
        part.hnsw.efSearch = 64


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
