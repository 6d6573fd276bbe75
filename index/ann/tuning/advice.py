"""What to change in an index that does not reach a recall target."""

from __future__ import annotations

from typing import Any

from index.ann.factory import import_faiss
from index.ann.settings import core, index_layers

# Factory strings of codes, by bits per dimension.
CODES = {8: "SQ8", 16: "SQfp16", 32: "Flat"}


def exact_at_limit(index: Any) -> bool:
    """Whether `index` is exact at its largest setting: uncompressed float32 vectors, and all inverted lists visited.

    An index with a refinement is not: no setting re-scores all candidates.
    """
    faiss = import_faiss()
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIVF):
        return isinstance(outer, faiss.IndexIVFFlat) and not _has_centroid_graph(outer)
    return isinstance(outer, faiss.IndexFlat)


def advice(index: Any, *, mean_reaches: bool) -> str:
    """What to change if no setting of `index` reaches a target.

    Args:
        index: the measured index.
        mean_reaches: the mean recall reaches the target, but the lower end of its confidence interval does not.
    """
    faiss = import_faiss()
    if mean_reaches or exact_at_limit(index):
        return "measure by more queries (queries, held_out), for only the interval is too wide"
    refinements = [
        faiss.downcast_index(part.refine_index) for part in index_layers(index) if isinstance(part, faiss.IndexRefine)
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
        return f"take a finer code ({_finer_codes(codes)}){refine}"
    if graph:
        return "take a graph of more links, such as HNSW64, or compare with every passage (Flat)"
    if isinstance(inner, faiss.IndexIVF) and _has_centroid_graph(inner):
        return f"find its {inner.nlist} lists without a graph (IVF{inner.nlist},Flat), or take fewer of them"
    return "compare with every passage (Flat)"


def _has_centroid_graph(ivf: Any) -> bool:
    faiss = import_faiss()
    return not isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)


def _finer_codes(codes: Any) -> str:
    """Factory strings of codes with more bits per dimension than `codes`."""
    bits = 8 * codes.sa_code_size() / codes.d
    return ", ".join(name for wider, name in CODES.items() if wider > bits) or CODES[32]
