"""Searching a selection of the rows of a faiss index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import MIN_CENTROID_EF_SEARCH
from index.fields.filters import FilterError

# Searches a faiss index: (queries [Q, D], k, faiss search parameters) -> scores [Q, k], rows [Q, k].
FaissSearch = Callable[[np.ndarray, int, Any], tuple[np.ndarray, np.ndarray]]


class Selection:
    """A selection of the rows of a faiss index.

    An inverted file and a graph look at as many selected rows as they would look at rows without a selection: nprobe
    and efSearch are divided by the share of the selected rows. So the cost of distances stays the same, and few
    selected rows are all found.

    Args:
        index: the faiss index.
        mask: which rows are selected, bool [N].
        factory: the faiss factory string, for messages.
    """

    def __init__(self, index: Any, mask: np.ndarray, factory: str) -> None:
        self.rows = int(mask.sum())
        self._factory = factory
        self._index = index
        self._mask = mask
        # faiss reads the bits in place.
        self._bits = np.packbits(mask, bitorder="little")

    def parameters(self, effort: int = 1) -> Any:
        """faiss search parameters; `effort` multiplies nprobe and efSearch."""
        selector = import_faiss().IDSelectorBitmap(self._bits)
        return _parameters(self._index, selector, max(1, len(self._mask) * effort / max(1, self.rows)))

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Whether the rows [...] int64 are selected; padding (-1) is."""
        return np.where(rows < 0, True, self._mask[rows])

    def search(self, search: FaissSearch, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the top k among the selected rows. Lists or a graph that yield too few are searched with more effort.

        Args:
            search: searches the faiss index: called with queries, k and faiss search parameters.
            queries: [Q, D] float32.
            k: results per query.

        Returns:
            scores [Q, k] float32 and rows [Q, k] int64, -inf and -1 where fewer rows were found.

        Raises:
            FilterError: faiss ignores selections in this type of index.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full(scores.shape, -1, np.int64)
        left, effort = np.arange(len(queries) if self.rows else 0), 1
        while len(left):
            scores[left], rows[left] = search(queries[left], k, self.parameters(effort))
            if not self.contains(rows[left]).all():
                raise FilterError(f"filter: expected another type of index, faiss ignores it in {self._factory}")
            left = left[(rows[left] >= 0).sum(axis=1) < min(k, self.rows)]
            # With this effort everything has been searched.
            if effort >= self.rows:
                break
            effort *= 8
        return scores, rows


def _parameters(layer: Any, selector: Any, factor: float) -> Any:
    faiss = import_faiss()
    layer = faiss.downcast_index(layer)
    if isinstance(layer, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(layer.index, selector, factor))
    if isinstance(layer, faiss.IndexRefine):
        inner = _parameters(layer.base_index, selector, factor)
        return faiss.IndexRefineSearchParameters(k_factor=layer.k_factor, base_index_params=inner)
    if isinstance(layer, faiss.IndexIVF):
        nprobe = min(layer.nlist, int(np.ceil(layer.nprobe * factor)))
        quantizer = faiss.downcast_index(layer.quantizer)
        of_quantizer = None
        if isinstance(quantizer, faiss.IndexHNSW):
            effort = max(MIN_CENTROID_EF_SEARCH, quantizer.hnsw.efSearch, nprobe)
            of_quantizer = faiss.SearchParametersHNSW(efSearch=effort)
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe, quantizer_params=of_quantizer)
    if isinstance(layer, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(
            sel=selector, efSearch=min(layer.ntotal, int(np.ceil(layer.hnsw.efSearch * factor)))
        )
    return faiss.SearchParameters(sel=selector)
