"""Searching several indexes as if they were one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from index.ann.index import Index
from index.ann.layout import IDS_FILE
from index.files import InputError
from index.manifest import Level
from index.passages import Passage
from index.store.ids import Ids


class Indexes:
    """Several indexes of passages, searched together: the rows of the first come first, then those of the second.

    Searches, ranks and gives passages as one `Index` does. Made by `open`.
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
        self._refuse_overlap()

    @classmethod
    def open(
        cls,
        folders: Sequence[Path],
        *,
        verify: Level = "size",
        mmap: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Indexes:
        """Open the indexes in `folders`, one at least, as `Index.open` does.

        Raises:
            InputError: a folder holds no index, a damaged one, one of another model or dimension, or one that was
                built of the same store, or part of one, as another.
        """
        if not folders:
            raise InputError("expected an index or more to search, found none")
        return cls([Index.open(folder, verify=verify, mmap=mmap, progress=progress) for folder in folders])

    @cached_property
    def ids(self) -> Ids:
        """The id of every row, left on disk."""
        return Ids([(index.folder / IDS_FILE, index.rows) for index in self.indexes])

    def passage(self, row: int) -> Passage:
        """The passage of `row`, 0 to N - 1.

        Raises:
            IndexError: there is no such row.
            InputError: the line on disk is no passage.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of indexes of {self.rows}")
        index, within = self._place(row)
        return index.passage(within)

    def check_model(self, model: dict[str, str]) -> None:
        """Refuse to search with vectors of another model than the one that embedded the passages.

        Raises:
            InputError: the two differ.
        """
        for index in self.indexes:
            index.check_model(model)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` of what every index finds, by score and then by id, both descending.

        A passage that several find is given once, with the best of its scores. Of exact indexes the merge is exact,
        ties at the cut included: each index gives the k of highest score and id that it holds, and the k of all are
        among them.

        Returns:
            scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64, as `Index.search` gives them.

        Raises:
            as `Index.search`.
        """
        found = [index.search(queries, k) for index in self.indexes]
        scores = np.concatenate([some for some, _ in found], axis=1)
        shifted = [np.where(rows < 0, -1, rows + self._starts[n]) for n, (_, rows) in enumerate(found)]
        rows = np.concatenate(shifted, axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        tied = ((scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)).any(axis=1)
        for query in np.flatnonzero(tied):
            there = rows[query] >= 0
            found_rows = rows[query, there].tolist()
            ids = [self.ids[row] for row in found_rows]
            ranked = sorted(zip(scores[query, there].tolist(), ids, found_rows, strict=True), reverse=True)
            rows[query, there] = [row for _, _, row in ranked]
        return self._once(scores, rows, min(k, self.rows))

    def ranked(self, queries: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """For each of `queries` [Q, D], up to `k` pairs of id and score, in the order of `search`.

        Raises:
            as `search`.
        """
        scores, rows = self.search(queries, k)
        return [
            [(self.ids[row], score) for score, row in zip(some_scores, some_rows, strict=True) if row >= 0]
            for some_scores, some_rows in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def _once(self, scores: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` of `scores` and `rows` [Q, n] but for those whose id came before, filled up at the end."""
        first_scores = np.full((len(rows), count), -np.inf, np.float32)
        first_rows = np.full((len(rows), count), -1, np.int64)
        for query, found in enumerate(rows.tolist()):
            places: dict[str, int] = {}
            for place, row in enumerate(found):
                if row < 0 or len(places) == count:
                    break
                places.setdefault(self.ids[row], place)
            taken = list(places.values())
            first_scores[query, : len(taken)] = scores[query, taken]
            first_rows[query, : len(taken)] = rows[query, taken]
        return first_scores, first_rows

    def _refuse_overlap(self) -> None:
        """No two may be built of the same store or part: one of them was meant to be another."""
        holder: dict[str, Index] = {}
        for index in self.indexes:
            for source in index.manifest.field("sources", list):
                other = holder.setdefault(str(source), index)
                if other is not index:
                    found = "found the same"
                    raise InputError(f"{index.folder}: expected other passages than those of {other.folder}, {found}")

    def _place(self, row: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.indexes[number], int(row - self._starts[number])


def open_all(
    folders: Sequence[Path],
    *,
    verify: Level = "size",
    mmap: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Index | Indexes:
    """The index in the one folder, or those in several as one, opened as `Index.open` does.

    Raises:
        InputError: as `Indexes.open`.
    """
    if len(folders) == 1:
        return Index.open(folders[0], verify=verify, mmap=mmap, progress=progress)
    return Indexes.open(folders, verify=verify, mmap=mmap, progress=progress)
