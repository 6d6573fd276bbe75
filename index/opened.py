"""An index folder, opened for searching: checked, read whole or memory-mapped, its ties in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from index.arrays import map_array
from index.factory import import_faiss, reason
from index.files import InputError, parse_json
from index.ids import Ids
from index.layout import FAISS_FILE, FILES, IDS_FILE, LISTS_FILE, OFFSETS_FILE, OPTIONAL_FILES, PASSAGES_FILE
from index.manifest import INDEX, NAME, Level, Manifest, read_manifest, verify_files
from index.passages import Passage, file_state, parse_passage
from index.quiet import quiet
from index.records import Record
from index.settings import core
from index.structure import check_structure

# Beyond k, asked of a Flat index: ties across the cut are rarely longer.
SPARE = 16
# A file that is mapped is checked byte by byte up to this size, which takes a fraction of a second. Of a larger one
# only the structure is checked: to read all of it is what mapping avoids.
HASHED_WHEN_MAPPED = 2**28


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
        # Of the files that were checked: what a change of them changes.
        self._checked: dict[str, tuple[int, int, int]] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        verify: Level = "size",
        mmap: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Index:
        """Open the index in `folder`, checking the length of every file, or at "hash" its every byte.

        The faiss file is checked byte by byte at "size" too, unless it is mapped and larger than 256 MiB: damage in it
        could end the process. The sizes within it are checked in any case. So are lists in a file of their own, which
        is always mapped: damage in them could find other passages, or none.

        Args:
            folder: the index.
            verify: how much of it to check.
            mmap: leave the vectors on disk, and read what a search touches: for indexes larger than memory. Such an
                index can be searched, not changed.
            progress: called with the number of bytes just checked.

        Raises:
            InputError: `folder` holds no index, or a damaged one.
        """
        index = cls(read_manifest(folder, INDEX), mmap=mmap)
        verify_files(index.manifest, "size")
        if verify == "hash":
            index.check(progress)
        else:
            mapped = {FAISS_FILE: mmap, LISTS_FILE: True}
            index.check(
                progress,
                [
                    name
                    for name, entry in index.manifest.files.items()
                    if name in mapped and not (mapped[name] and entry.bytes > HASHED_WHEN_MAPPED)
                ],
            )
        index.open_files()
        return index

    def open_files(self) -> None:
        """Open the files that a search reads, which otherwise happens when they are first needed.

        Raises:
            InputError: one cannot be read, or does not hold what the manifest says.
        """
        _ = self.faiss, self._offsets

    def check(self, progress: Callable[[int], None] | None = None, names: Sequence[str] | None = None) -> None:
        """Check every byte of its files, or of those called `names`, except of those that have not changed since then.

        Whatever makes a number or a file of an index calls it first.

        Args:
            progress: called with the number of bytes just checked.

        Raises:
            InputError: a file is missing or damaged; the message names it.
        """
        states = {name: file_state(self.folder / name) for name in (self.manifest.files if names is None else names)}
        left = {name: state for name, state in states.items() if state is None or self._checked.get(name) != state}
        verify_files(self.manifest.of(list(left)), "hash", progress)
        self._checked.update({name: state for name, state in left.items() if state is not None})

    @cached_property
    def faiss(self) -> Any:
        """The faiss index itself, row n of it being the passage of row n."""
        path = self.folder / FAISS_FILE
        if FAISS_FILE in self._checked:
            self.check(names=[FAISS_FILE])
        index = read_faiss(path, mmap=self._mmap)
        check_structure(index, path, self.rows, self.dim)
        return index

    @cached_property
    def ids(self) -> Ids:
        """The id of every row, left on disk."""
        return Ids([(self.folder / IDS_FILE, self.rows)])

    @cached_property
    def _offsets(self) -> np.ndarray:
        return map_array(self.folder / OFFSETS_FILE, np.dtype("<u8"), (self.rows,))

    def passage(self, row: int) -> Passage:
        """The passage of `row`, 0 to N - 1, read from disk without reading the others.

        Raises:
            IndexError: there is no such row.
            InputError: the line on disk is no passage, or not the one of this row.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of an index of {self.rows}")
        path = self.folder / PASSAGES_FILE
        place = f"{path}:{row + 1}"
        offset = int(self._offsets[row])
        size = self.manifest.files[PASSAGES_FILE].bytes
        with open(path, "rb") as stream:
            stream.seek(max(0, min(offset, size) - 1))
            if offset >= size or (stream.read(1) if offset else b"\n") != b"\n":
                found = f"expected where line {row + 1} of {PASSAGES_FILE} begins, found byte {offset}"
                raise InputError(f"{self.folder / OFFSETS_FILE}: damaged: {found}")
            line = stream.readline()
        try:
            fields = parse_json(line.decode(), place)
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: expected UTF-8, found: {error}") from None
        if not isinstance(fields, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(fields).__name__}")
        passage = parse_passage(Record(place, fields))
        if passage.id != self.ids[row]:
            found = f"found {passage.id!r:.60} in {PASSAGES_FILE} and {self.ids[row]!r:.60} in {IDS_FILE}"
            raise InputError(f"{self.folder}: damaged: expected one id for row {row}, {found}")
        return passage

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
            InputError: a query holds NaN or infinity, or what faiss finds are no rows of the index or no numbers.
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
        try:
            scores, rows = self.faiss.search(queries, asked)
        except RuntimeError as error:
            raise InputError(f"{self.folder / FAISS_FILE}: cannot be searched by faiss: {reason(error)}") from None
        self._refuse_damage(scores, rows)
        scores[rows < 0] = -np.inf
        self._order_ties(scores, rows)
        beyond = (scores[:, k - 1] == scores[:, -1]) & (k < asked < self.rows)
        scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
        if beyond.any():
            scores[beyond], rows[beyond] = self._search(queries[beyond], k, k + 2 * spare)
        return scores, rows

    def _refuse_damage(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Large lists on disk are not read as a whole before a search: damage in them is seen in what is found."""
        path = self.folder / (LISTS_FILE if LISTS_FILE in self.manifest.files else FAISS_FILE)
        if (wrong := (rows < -1) | (rows >= self.rows)).any():
            found = f"found row {int(rows[wrong][0])}"
            raise InputError(f"{path}: damaged: expected rows from 0 to {self.rows - 1}, {found}")
        if (wrong := ~np.isfinite(scores) & (rows >= 0)).any():
            found = f"found {scores[wrong][0]} for row {int(rows[wrong][0])}"
            raise InputError(f"{path}: expected scores that are numbers, {found}: damaged, or its vectors are too long")

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
    if isinstance(inner, faiss.IndexFastScan):
        # faiss 1.15.1 leaves the number of places as it was, and would write it.
        inner.ntotal2 = 0
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
        except (RuntimeError, MemoryError, UnicodeDecodeError) as error:  # of bytes that a message quotes
            why = reason(error)
    raise InputError(f"{path}: cannot be read by faiss: {why}")
