"""Searching several indexes as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from index.ann.gpu.search import Spread
from index.ann.index import Index
from index.ann.layout import IDS_FILE
from index.fields.filters import Filter, FilterInput, as_filter
from index.files import InputError
from index.manifest import Level
from index.passages import Passage
from index.store.ids import Ids, ids_of_rows
from index.ties import order_ties


class MultiIndex:
    """Several indexes searched as one, with the interface of `Index`. Created by `MultiIndex.open`.

    Rows are numbered consecutively: those of the first index come first, then those of the second, and so on.

    Attributes:
        indexes: the indexes.
        folder: folder of the first index.
        rows: N, the total number of passages.
        dim: D, the length of a vector.
        model: identifies the model that embedded the passages.
        factory: the factory strings, joined by " + ".
    """

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = list(indexes)
        first = self.indexes[0]
        self.folder = first.folder
        self.dim = first.dim
        self.model = first.model
        self.factory = " + ".join(dict.fromkeys(index.factory for index in self.indexes))
        self._starts = np.cumsum([0, *(index.rows for index in self.indexes)])
        self.rows = int(self._starts[-1])
        for index in self.indexes[1:]:
            index.check_model(first.model)
            if index.dim != first.dim:
                raise InputError(f"{index.folder}: expected vectors of {first.dim} dimensions, found {index.dim}")
        self._check_disjoint()
        for start in self._starts[:-1]:
            # Opens the files of ids, which may be replaced later.
            _ = self.ids[int(start)]

    @classmethod
    def open(
        cls,
        folders: Sequence[Path],
        *,
        verify: Level = "size",
        mmap: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> MultiIndex:
        """Open the indexes in `folders` (at least one).

        Args:
            folders: folders of the indexes.
            verify: as in `Index.open`.
            mmap: as in `Index.open`.
            progress: called with the number of bytes just checked.

        Raises:
            InputError: a folder contains no index, a damaged one, or one of another model or dimension; or two indexes
                contain the same store or part of a store.
        """
        if not folders:
            raise InputError("expected an index or more to search, found none")
        return cls([Index.open(folder, verify=verify, mmap=mmap, progress=progress) for folder in folders])

    def __repr__(self) -> str:
        return f"MultiIndex({[str(index.folder) for index in self.indexes]}, rows={self.rows}, dim={self.dim})"

    def to(
        self,
        device: str,
        *,
        spread: Spread = "auto",
        optional: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> MultiIndex:
        """Search all indexes on another device from now on, with the arguments of `Index.to`.

        Raises:
            NotOnGpu: as `Index.to`.
        """
        for index in self.indexes:
            index.to(device, spread=spread, optional=optional, note=note)
        return self

    @property
    def device(self) -> str:
        """Where searches run, joined by " + "."""
        return " + ".join(dict.fromkeys(index.device for index in self.indexes))

    @cached_property
    def ids(self) -> Ids:
        """The id of every row, left on disk."""
        return Ids([(index.folder / IDS_FILE, index.rows) for index in self.indexes])

    def passage(self, row: int) -> Passage:
        """The passage of `row`, 0 to N - 1.

        Raises:
            IndexError: `row` is out of range.
            InputError: the line on disk is not a passage.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of indexes of {self.rows}")
        index, within = self._locate(row)
        return index.passage(within)

    def matching(self, filter: Filter) -> np.ndarray:
        """Which rows match a filter, bool [N].

        Raises:
            InputError: as `Index.matching`.
        """
        return np.concatenate([index.matching(filter) for index in self.indexes])

    def check_model(self, model: dict[str, str]) -> None:
        """Check that queries come from the model that embedded the passages.

        Raises:
            InputError: the models differ.
        """
        for index in self.indexes:
            index.check_model(model)

    def search(
        self, queries: np.ndarray, k: int = 10, *, filter: FilterInput | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest passages of each query by inner product, with their ids.

        Passages with equal scores are sorted by id, descending.

        Args:
            queries: [Q, D] float32, for example from `Model.encode_queries`.
            k: passages per query. Default: 10.
            filter: as in `Index.search`. Default: None.

        Returns:
            scores [Q, min(k, N)] float32, descending, and ids [Q, min(k, N)] of type str. An approximate index may
            find fewer passages: the remaining entries, always the last, have id "" and score -inf.

        Raises:
            InputError: as `search_rows`.
            ValueError: as `search_rows`.
        """
        scores, rows = self.search_rows(queries, k, as_filter(filter))
        return scores, ids_of_rows(self.ids, rows)

    def search_rows(self, queries: np.ndarray, k: int, filter: Filter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest passages of all indexes, by score and then by id, both descending.

        A passage that occurs in several indexes is returned once, with its highest score. With exact indexes the result
        is exact, including ties at rank k: the top k of all are among the top k of each.

        Args:
            queries: [Q, D] float32.
            k: passages per query.
            filter: only passages that match.

        Returns:
            scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, as `Index.search_rows` returns them.

        Raises:
            InputError: as `Index.search_rows`.
            ValueError: as `Index.search_rows`.
        """
        found = [index.search_rows(queries, k, filter) for index in self.indexes]
        shifted = [
            (scores, np.where(rows < 0, -1, rows + start))
            for (scores, rows), start in zip(found, self._starts, strict=False)
        ]
        # Of a passage with equal scores in several indexes, that of the last index is returned.
        scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*reversed(shifted), strict=True))
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        order_ties(scores, rows, self.ids)
        return self._drop_duplicates(scores, rows, min(k, self.rows))

    def _drop_duplicates(self, scores: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keep the first result of each id in `scores` and `rows` [Q, n]; cut or pad to `count` columns."""
        first_scores = np.full((len(rows), count), -np.inf, np.float32)
        first_rows = np.full((len(rows), count), -1, np.int64)
        for query, found in enumerate(rows.tolist()):
            first_columns: dict[str, int] = {}
            for column, row in enumerate(found):
                if row < 0 or len(first_columns) == count:
                    break
                first_columns.setdefault(self.ids[row], column)
            taken = list(first_columns.values())
            first_scores[query, : len(taken)] = scores[query, taken]
            first_rows[query, : len(taken)] = rows[query, taken]
        return first_scores, first_rows

    def _check_disjoint(self) -> None:
        """Refuse indexes that contain the same store or part, which is nearly always a mistake in the arguments."""
        holder: dict[str, Index] = {}
        for index in self.indexes:
            for source in index.manifest.field("sources", list):
                other = holder.setdefault(str(source), index)
                if other is not index:
                    found = "found the same"
                    raise InputError(f"{index.folder}: expected other passages than those of {other.folder}, {found}")

    def _locate(self, row: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.indexes[number], int(row - self._starts[number])


def open_all(
    folders: Sequence[Path],
    *,
    verify: Level = "size",
    mmap: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Index | MultiIndex:
    """Open one index, or several as a `MultiIndex`, with the arguments of `Index.open`.

    Raises:
        InputError: as `MultiIndex.open`.
    """
    if len(folders) == 1:
        return Index.open(folders[0], verify=verify, mmap=mmap, progress=progress)
    return MultiIndex.open(folders, verify=verify, mmap=mmap, progress=progress)
