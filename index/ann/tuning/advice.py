"""What to build instead of an index that does not reach a recall target, by what keeps it from reaching it."""

from __future__ import annotations

from typing import Any

from index.ann.factory import import_faiss
from index.ann.settings import core, parts

# Codes by bits for each number of a vector, as a factory string names them.
CODES = {8: "SQ8", 16: "SQfp16", 32: "Flat"}


def reaches_all(index: Any) -> bool:
    """Whether the largest setting of `index` makes it exact: float32 vectors as they came, in lists that are all seen.

    What a refinement wraps is not looked into, for no setting lets it see all candidates.
    """
    faiss = import_faiss()
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIVF):
        return isinstance(outer, faiss.IndexIVFFlat) and not _by_graph(outer)
    return isinstance(outer, faiss.IndexFlat)


def advice(index: Any, *, mean_reaches: bool) -> str:
    """What to change where no setting of `index` meets a target.

    Args:
        index: that was measured.
        mean_reaches: the mean recall is high enough, and only the lower end of its interval is not.
    """
    faiss = import_faiss()
    if mean_reaches or reaches_all(index):
        return "measure by more queries (--queries, --held-out), for only the interval is too wide"
    refinements = [
        faiss.downcast_index(part.refine_index) for part in parts(index) if isinstance(part, faiss.IndexRefine)
    ]
    change = _change(index, refined=bool(refinements))
    if refinements and not all(isinstance(each, faiss.IndexFlat) for each in refinements):
        return f"{change}, or refine by exact vectors (…,RFlat)"
    return change


def _change(index: Any, refined: bool) -> str:
    faiss = import_faiss()
    inner = core(index)
    graph = isinstance(inner, faiss.IndexHNSW | faiss.IndexNSG | faiss.IndexNNDescent)
    codes = faiss.downcast_index(inner.storage) if graph else inner
    refine = "" if refined else ", or add a refinement (…,RFlat)"
    if inner.d < index.d:
        return f"keep more than {inner.d} of {index.d} dimensions{refine}"
    if not isinstance(codes, faiss.IndexFlat | faiss.IndexIVFFlat):
        return f"take a finer code ({_finer(codes)}){refine}"
    if graph:
        return "take a graph of more links, such as HNSW64, or compare with every passage (Flat)"
    if isinstance(inner, faiss.IndexIVF) and _by_graph(inner):
        return f"find its {inner.nlist} lists without a graph (IVF{inner.nlist},Flat), or take fewer of them"
    return "compare with every passage (Flat)"


def _by_graph(ivf: Any) -> bool:
    faiss = import_faiss()
    return not isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)


def _finer(codes: Any) -> str:
    """The codes of more bits than these."""
    bits = 8 * codes.sa_code_size() / codes.d
    return ", ".join(name for wider, name in CODES.items() if wider > bits) or CODES[32]
