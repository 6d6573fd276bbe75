"""How an index searches: the settings that weigh recall against time, wherever in a nested index they sit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from index.ann.factory import import_faiss

LEAST_CENTROID_EFFORT = 128
ADDING_CENTROID_EFFORT = 32


@dataclass(frozen=True)
class Settings:
    """What a search looks at; None where the index has no such setting."""

    nprobe: int | None = None
    """Lists visited, of an inverted file."""
    ef_search: int | None = None
    """Candidates kept while walking a graph."""
    k_factor: float | None = None
    """Candidates looked at again by a refining index, as a multiple of k."""

    @classmethod
    def of(cls, index: Any) -> Settings:
        """Those that `index` has now."""
        faiss = import_faiss()
        found: dict[str, Any] = {}
        for part in parts(index):
            if isinstance(part, faiss.IndexRefine):
                found["k_factor"] = float(part.k_factor)
            elif isinstance(part, faiss.IndexIVF):
                found["nprobe"] = int(part.nprobe)
            elif isinstance(part, faiss.IndexHNSW):
                found["ef_search"] = int(part.hnsw.efSearch)
        return cls(**found)

    def apply(self, index: Any) -> None:
        """Search `index` so from now on. The settings are saved in its faiss file: plain faiss searches alike."""
        faiss = import_faiss()
        for part in parts(index):
            if isinstance(part, faiss.IndexRefine) and self.k_factor is not None:
                part.k_factor = self.k_factor
            elif isinstance(part, faiss.IndexIVF) and self.nprobe is not None:
                part.nprobe = self.nprobe
                _set_centroid_effort(part, max(LEAST_CENTROID_EFFORT, self.nprobe))
            elif isinstance(part, faiss.IndexHNSW) and self.ef_search is not None:
                part.hnsw.efSearch = self.ef_search

    def known(self) -> dict[str, int | float]:
        """Those that are there, by their names."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.known().items()) or "no settings"


def prepare_to_add(index: Any) -> None:
    """Let a graph of centroids look a little further than faiss's 16 for the one list that a vector goes to."""
    faiss = import_faiss()
    inner = core(index)
    if isinstance(inner, faiss.IndexIVF):
        _set_centroid_effort(inner, ADDING_CENTROID_EFFORT)


def _set_centroid_effort(ivf: Any, effort: int) -> None:
    """Set the efSearch of the graph that finds an inverted file's centroids, where it has one.

    faiss leaves it at 16 whatever nprobe is: of 512 lists asked for, half were not the nearest (16,384 centroids of 128
    dimensions), and no nprobe reached a recall of 0.8. With as much effort as lists, 0.998 of them are.
    """
    faiss = import_faiss()
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efSearch = effort


def parts(index: Any) -> Iterator[Any]:
    """`index` and what it wraps, from the outside to the core: transforms, refining indexes, then the index itself."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    yield part
    while isinstance(part, faiss.IndexPreTransform | faiss.IndexRefine):
        part = faiss.downcast_index(part.base_index if isinstance(part, faiss.IndexRefine) else part.index)
        yield part


def core(index: Any) -> Any:
    """The innermost part of `index`: an inverted file, a graph, or codes that are all compared."""
    *_, last = parts(index)
    return last


def flat_codes(index: Any) -> list[Any]:
    """The parts of `index` that hold a code for every row: its core, or a graph's storage, and all refinements."""
    faiss = import_faiss()
    layers = list(parts(index))
    inner = layers[-1]
    held = [inner.storage] if isinstance(inner, faiss.IndexHNSW) else [inner]
    held += [layer.refine_index for layer in layers if isinstance(layer, faiss.IndexRefine)]
    return [faiss.downcast_index(each) for each in held]


def set_search_defaults(index: Any) -> None:
    """Let a search look at enough of the index: with faiss's own defaults (1 list, no reserve) it finds far too little.

    For those who set no recall target: 1/64 of the lists and at least 16, efSearch 64, 4k candidates to refine.
    """
    faiss = import_faiss()
    inner = core(index)
    nprobe = min(inner.nlist, max(16, inner.nlist // 64)) if isinstance(inner, faiss.IndexIVF) else None
    Settings(nprobe, 64, 4.0).apply(index)
