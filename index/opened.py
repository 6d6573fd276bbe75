"""An index folder, opened for searching: checked, read whole or memory-mapped, its ties in order."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from index.factory import import_faiss, reason
from index.files import InputError, parse_json
from index.ids import Ids
from index.layout import FAISS_FILE, FILES, IDS_FILE, LISTS_FILE, OFFSETS_FILE, OPTIONAL_FILES, PASSAGES_FILE
from index.manifest import INDEX, NAME, Level, Manifest, read_manifest, verify_files
from index.passages import Passage, parse_passage
from index.quiet import quiet
from index.records import Record
from index.settings import core

# Beyond k, asked of a Flat index: ties across the cut are rarely longer.
SPARE = 16


class Index:
    """An index of passages on disk, opened for searching. Made by `open`."""

    def __init__(self, manifest: Manifest, *, mmap: bool = False) -> None:
        self.folder = manifest.folder
        self.manifest = manifest
        self._mmap = mmap
        self.factory = manifest.field("factory", str)
        self.rows = manifest.count("rows")
        self.dim = manifest.count("dim")
        self.model = manifest.texts("model")
        if set(manifest.files) - set(OPTIONAL_FILES) != set(FILES):
            raise InputError(
                f"{manifest.folder / NAME}: expected the files {', '.join(FILES)}, "
                f"found {', '.join(manifest.files) or 'none'}"
            )

    @classmethod
    def open(cls, folder: Path, *, verify: Level = "size", mmap: bool = False) -> Index:
        """Open the index in `folder`, checking the length of every file, or at "hash" its every byte.

        Args:
            folder: the index.
            verify: how much of it to check.
            mmap: leave the vectors on disk, and read what a search touches: for indexes larger than memory. Such an
                index can be searched, not changed.

        Raises:
            InputError: `folder` holds no index, or a damaged one.
        """
        manifest = read_manifest(folder, INDEX)
        index = cls(manifest, mmap=mmap)
        verify_files(manifest, verify)
        if index.faiss.ntotal != index.rows or index.faiss.d != index.dim:
            raise InputError(
                f"{folder / FAISS_FILE}: expected {index.rows} vectors of {index.dim} dimensions, "
                f"found {index.faiss.ntotal} of {index.faiss.d}"
            )
        if index._offsets.shape != (index.rows,) or index._offsets.dtype != np.uint64:
            raise InputError(
                f"{folder / OFFSETS_FILE}: expected uint64 ({index.rows},), "
                f"found {index._offsets.dtype} {index._offsets.shape}"
            )
        return index

    @cached_property
    def faiss(self) -> Any:
        """The faiss index itself, row n of it being the passage of row n."""
        return read_faiss(self.folder / FAISS_FILE, mmap=self._mmap)

    @cached_property
    def ids(self) -> Ids:
        """The id of every row, left on disk."""
        return Ids([(self.folder / IDS_FILE, self.rows)])

    @cached_property
    def _offsets(self) -> np.ndarray:
        path = self.folder / OFFSETS_FILE
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{path}: expected an array in npy format, found: {error}") from None

    def passage(self, row: int) -> Passage:
        """The passage of `row`, 0 to N - 1, read from disk without reading the others.

        Raises:
            IndexError: there is no such row.
            InputError: the line on disk is no passage.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of an index of {self.rows}")
        path = self.folder / PASSAGES_FILE
        place = f"{path}:{row + 1}"
        with open(path, "rb") as stream:
            stream.seek(int(self._offsets[row]))
            line = stream.readline()
        try:
            fields = parse_json(line.decode(), place)
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: expected UTF-8, found: {error}") from None
        if not isinstance(fields, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(fields).__name__}")
        return parse_passage(Record(place, fields))

    def check_model(self, model: dict[str, str]) -> None:
        """Refuse to search with vectors of another model than the one that embedded the passages.

        Raises:
            InputError: the two differ.
        """
        for name in {**self.model, **model}:
            if self.model.get(name) != model.get(name):
                raise InputError(
                    f"{self.folder}: expected queries of the model that embedded its passages ({name} "
                    f"{self.model.get(name)}), found another ({name} {model.get(name)})"
                )

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """What faiss finds nearest to `queries` [Q, D] float32; equal scores rank by id, descending.

        That is the order of `exact.search`, and so of evaluation. A Flat index keeps to it at the cut too: of the
        passages tied for the last places, those of highest id are taken. Other indexes cut as faiss does, and only
        what they return is put in order. The two round products differently, by about 1e-7, which can still make a
        tie in one that is none in the other.

        Returns:
            scores [Q, min(k, N)] float32, descending, and rows [Q, min(k, N)] int64. An approximate index may find
            fewer: the places left over, always the last, have row -1 and score -inf. `ranked` leaves them out.

        Raises:
            InputError: a query holds NaN or infinity.
            ValueError: `queries` has another shape, or `k` is below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries: expected shape [Q, {self.dim}], found {queries.shape}")
        if k < 1:
            raise ValueError(f"k: expected a number above 0, found {k}")
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            raise InputError(f"query {int(np.argmin(finite))}: expected a finite vector, found NaN or infinity")
        spare = SPARE if isinstance(self.faiss, import_faiss().IndexFlat) else 0
        return self._search(np.ascontiguousarray(queries, np.float32), min(k, self.rows), spare)

    def _search(self, queries: np.ndarray, k: int, spare: int) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` of the best `k + spare`; with a spare, more are asked for until no tie reaches the last."""
        asked = min(k + spare, self.rows)
        scores, rows = self.faiss.search(queries, asked)
        scores[rows < 0] = -np.inf
        self._order_ties(scores, rows)
        beyond = (scores[:, k - 1] == scores[:, -1]) & (k < asked < self.rows)
        scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
        if beyond.any():
            scores[beyond], rows[beyond] = self._search(queries[beyond], k, k + 2 * spare)
        return scores, rows

    def _order_ties(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Put the `rows` [Q, n] of equal `scores` [Q, n], descending, in the order of their ids, descending."""
        tied = ((scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)).any(axis=1)
        for query in np.flatnonzero(tied):
            found = rows[query][rows[query] >= 0].tolist()
            ids = [self.ids[row] for row in found]
            ranked = sorted(zip(scores[query, : len(found)].tolist(), ids, found, strict=True), reverse=True)
            rows[query, : len(found)] = [row for _, _, row in ranked]

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


def read_faiss(path: Path, *, mmap: bool = False) -> Any:
    """Read a faiss file; its lists on disk, where it has any, are looked for beside it and not written to.

    Raises:
        InputError: faiss cannot read it.
    """
    lists, rest = _maps_lists(path), getattr(import_faiss(), "IO_FLAG_MMAP_IFC", 0)
    # One flag maps inverted lists and the other all else; faiss refuses the two together where there are both.
    return _read(path, [lists | rest, lists] if mmap else [0])


def read_trained(path: Path) -> Any:
    """Read a faiss file but for the vectors in it: a trained and empty index, which takes new ones.

    Inverted lists are not read, in whichever file they are.

    Raises:
        InputError: faiss cannot read it.
    """
    faiss = import_faiss()
    # The lists alone are mapped: what else is mapped cannot be emptied.
    index = _read(path, [_maps_lists(path)])
    inner = core(index)
    if isinstance(inner, faiss.IndexIVF) and isinstance(
        faiss.downcast_InvertedLists(inner.invlists), faiss.OnDiskInvertedLists
    ):
        # Nor can these: others take their place.
        empty = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
        inner.replace_invlists(empty, True)
        empty.this.disown()
    index.reset()
    return index


def _maps_lists(path: Path) -> int:
    """The flag that leaves the lists of a faiss file on disk; none where they have a file of their own.

    That is mapped in any case; told to map, faiss 1.15.1 leaves it out, and the first search ends the process.
    """
    return 0 if (path.parent / LISTS_FILE).exists() else int(import_faiss().IO_FLAG_MMAP)


def _read(path: Path, tries: list[int]) -> Any:
    """Read a faiss file with the first flags of `tries` that it can be read with."""
    faiss = import_faiss()
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    on_disk = (path.parent / LISTS_FILE).exists()
    for mapped in tries:
        try:
            with quiet() if on_disk else contextlib.nullcontext():
                return faiss.read_index(str(path.absolute()), flags | mapped)
        except (RuntimeError, MemoryError) as error:
            why = reason(error)
    raise InputError(f"{path}: cannot be read by faiss: {why}")
