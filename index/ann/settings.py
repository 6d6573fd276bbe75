"""Search-time parameters (nprobe, efSearch, k_factor) of faiss indexes, including nested ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from index.ann.factory import import_faiss

MIN_CENTROID_EF_SEARCH = 128
ADD_CENTROID_EF_SEARCH = 32


@dataclass(frozen=True)
class Settings:
    """Search-time parameters; None where the index has no such parameter."""

    nprobe: int | None = None
    """Inverted lists visited per query (IVF)."""
    ef_search: int | None = None
    """Size of the candidate list of a graph search (HNSW efSearch)."""
    k_factor: float | None = None
    """Candidates that a refinement re-scores, as a multiple of k."""

    @classmethod
    def of(cls, index: Any) -> Settings:
        """The current settings of a faiss index."""
        faiss = import_faiss()
        found: dict[str, Any] = {}
        for part in index_layers(index):
            if isinstance(part, faiss.IndexRefine):
                found["k_factor"] = float(part.k_factor)
            elif isinstance(part, faiss.IndexIVF):
                found["nprobe"] = int(part.nprobe)
            elif isinstance(part, faiss.IndexHNSW):
                found["ef_search"] = int(part.hnsw.efSearch)
        return cls(**found)

    def apply(self, index: Any) -> None:
        """Set these parameters in a faiss index. They are saved in its file, so plain faiss uses them too."""
        faiss = import_faiss()
        for part in index_layers(index):
            if isinstance(part, faiss.IndexRefine) and self.k_factor is not None:
                part.k_factor = self.k_factor
            elif isinstance(part, faiss.IndexIVF) and self.nprobe is not None:
                part.nprobe = self.nprobe
                _set_centroid_ef_search(part, max(MIN_CENTROID_EF_SEARCH, self.nprobe))
            elif isinstance(part, faiss.IndexHNSW) and self.ef_search is not None:
                part.hnsw.efSearch = self.ef_search

    def known(self) -> dict[str, int | float]:
        """The settings that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.known().items()) or "no settings"


def set_add_effort(index: Any) -> None:
    """Raise the efSearch of a graph over centroids from faiss's 16, so that added vectors go to their nearest list."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexIVF):
        _set_centroid_ef_search(inner, ADD_CENTROID_EF_SEARCH)


def _set_centroid_ef_search(ivf: Any, effort: int) -> None:
    """Set the efSearch of the HNSW graph that finds the nearest centroids of an IVF index, if it has one.

    faiss leaves it at 16 whatever nprobe is: of 512 lists, half were not the nearest (16,384 centroids of 128
    dimensions), and no nprobe reached a recall of 0.8. With efSearch = nprobe, 99.8 % of the lists are the nearest.
    """
    faiss = import_faiss()
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efSearch = effort


def index_layers(index: Any) -> Iterator[Any]:
    """Yield `index` and the indexes that it wraps, outermost first: transforms, refinements, then the core index."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    yield part
    while isinstance(part, faiss.IndexPreTransform | faiss.IndexRefine):
        part = faiss.downcast_index(part.base_index if isinstance(part, faiss.IndexRefine) else part.index)
        yield part


def core(index: Any) -> Any:
    """The innermost index: IVF, a graph, or flat codes."""
    *_, last = index_layers(index)
    return last


def flat_codes(index: Any) -> list[Any]:
    """The indexes within `index` with one code per row: the core or the storage of a graph, and refinements."""
    faiss = import_faiss()
    layers = list(index_layers(index))
    inner = layers[-1]
    held = [inner.storage] if isinstance(inner, faiss.IndexHNSW) else [inner]
    held += [layer.refine_index for layer in layers if isinstance(layer, faiss.IndexRefine)]
    return [faiss.downcast_index(each) for each in held]


def set_search_defaults(index: Any) -> None:
    """Set default search parameters: nprobe nlist / 64 but at least 16, efSearch 64, k_factor 4.

    faiss's own defaults (nprobe 1, k_factor 1) give far too low a recall. A recall target replaces these.
    """
    faiss = import_faiss()
    inner = core(index)
    nprobe = min(inner.nlist, max(16, inner.nlist // 64)) if isinstance(inner, faiss.IndexIVF) else None
    Settings(nprobe, 64, 4.0).apply(index)
