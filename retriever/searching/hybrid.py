"""Hybrid search of an index: its dense ranking fused with a BM25 ranking of the same passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from eval.bm25.search import Bm25
from eval.fusion import fuse
from eval.ranking import RankedRun
from index.ann.index import Index
from index.fields.filters import Filter

if TYPE_CHECKING:
    from index.ann.multi_index import MultiIndex

Mode = Literal["dense", "hybrid", "bm25"]
FusionMethod = Literal["rrf", "minmax", "zscore"]
# Passages of each ranking that are fused, or k where that is more.
DEPTH = 100


class HybridIndex:
    """An index with a BM25 index of its passages in memory.

    Args:
        index: one index, or several searched as one.
        method: the fusion, see `eval.fusion.fuse`. Default: "rrf".
        dense_weight: weight of the dense ranking, 0 to 1; BM25's is 1 minus that. Default: 0.5.
        stopwords: language of BM25's stop words; None: none are removed. Default: "en".

    Raises:
        InputError: bm25s is not installed or lacks stop words for the language.
    """

    def __init__(
        self,
        index: Index | MultiIndex,
        method: FusionMethod = "rrf",
        dense_weight: float = 0.5,
        stopwords: str | None = "en",
    ) -> None:
        self.index = index
        self._method = method
        self._weights = [dense_weight, 1 - dense_weight]
        self._bm25 = Bm25((index.passage(row) for row in range(index.rows)), stopwords=stopwords)

    def search_rows(
        self,
        queries: Sequence[str],
        vectors: np.ndarray,
        k: int,
        filter: Filter | None = None,
        mode: Mode = "hybrid",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best passages of each query.

        The best DEPTH passages (or k, if that is more) of both rankings are fused.

        Args:
            queries: Q texts.
            vectors: their embeddings, [Q, D] float32.
            k: passages per query.
            filter: only passages that match.
            mode: "dense", "bm25", or "hybrid" for both.

        Returns:
            scores [Q, min(k, N)] and rows [Q, min(k, N)] int64, best first, padded with row -1 and score -inf.

        Raises:
            InputError: as `Index.search_rows`.
        """
        if mode == "dense":
            return self.index.search_rows(vectors, k, filter)
        mask = None if filter is None else self.index.matching(filter)
        depth = k if mode == "bm25" else max(k, DEPTH)
        scores, rows = self._bm25.search_rows(queries, depth, mask)
        if mode == "bm25":
            return np.where(rows >= 0, scores, -np.inf), rows.astype(np.int64)
        names = [str(number) for number in range(len(queries))]
        dense_scores, dense_rows = self.index.search_rows(vectors, depth, filter)
        # An id that several indexes hold is one passage.
        row_of = {self._bm25.ids[row]: row for row in np.unique([*rows.flat, *dense_rows.flat]).tolist() if row >= 0}
        runs = [
            {
                name: {self._bm25.ids[row]: score for row, score in zip(rows_, scores_, strict=True) if row >= 0}
                for name, rows_, scores_ in zip(names, found_rows.tolist(), found_scores.tolist(), strict=True)
            }
            for found_scores, found_rows in ((dense_scores, dense_rows), (scores, rows))
        ]
        fused: RankedRun = fuse(runs, self._method, weights=self._weights, k=k)
        return self._rows_of(fused, row_of, min(k, self.index.rows))

    def _rows_of(self, run: RankedRun, row_of: dict[str, int], width: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(run.queries), width), -1, np.int64)
        scores = np.full(rows.shape, -np.inf, np.float32)
        for query, ranking in enumerate(run.values()):
            for rank, (id_, score) in enumerate(ranking.items()):
                rows[query, rank], scores[query, rank] = row_of[id_], score
        return scores, rows
