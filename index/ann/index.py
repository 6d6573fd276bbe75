"""Opening and searching an index folder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss, reason
from index.ann.faiss_file import read_faiss
from index.ann.gpu.search import GpuIndex, Spread, to_gpus
from index.ann.gpu.support import NotOnGpu
from index.ann.layout import (
    FAISS_FILE,
    FIELDS_FILE,
    FILES,
    IDS_FILE,
    LISTS_FILE,
    OFFSETS_FILE,
    OPTIONAL_FILES,
    PASSAGES_FILE,
)
from index.ann.selection import Selection
from index.ann.structure import check_results, check_structure
from index.fields.columns import Columns
from index.fields.filters import Filter, FilterError, FilterInput, as_filter
from index.files import InputError
from index.manifest import INDEX, NAME, Level, Manifest, read_manifest, verify_files
from index.passage_lines import PassageLines
from index.passages import Passage, file_state
from index.store.ids import Ids, ids_of_rows
from index.ties import order_ties

# Extra results requested from a Flat index, to break ties at rank k by id.
SPARE = 16
# Selections of filters that are kept; each takes a byte and a bit per passage.
KEPT_FILTERS = 16
# A memory-mapped faiss file up to this size is hashed on opening, which takes a fraction of a second. Of larger ones
# only the structure is checked: mapping avoids reading all of it.
HASHED_MMAP_BYTES = 2**28


class Index:
    """An index of passages on disk. Created by `Index.open`.

    Attributes:
        folder: folder of the index.
        manifest: its manifest.
        rows: N, the number of passages.
        dim: D, the length of a vector.
        factory: the faiss factory string.
        model: identifies the model that embedded the passages (its sha256).
    """

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
        self._gpu: GpuIndex | None = None
        self._note: Callable[[str], None] | None = None
        # What the GPUs left to the CPU, said once.
        self._said: set[str] = set()
        # State of each file when it was verified, to detect later changes.
        self._checked: dict[str, tuple[int, int, int]] = {}
        # A reference to itself would keep an index, and the lists it maps, until the next garbage collection.
        self._selection = lru_cache(KEPT_FILTERS)(partial(Index._selection_of, weakref.proxy(self)))

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        verify: Level = "size",
        mmap: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Index:
        """Open the index in `folder`.

        Sizes within the faiss file are always checked. Its sha256 is checked too, even with `verify="size"`, unless it
        is memory-mapped and larger than 256 MiB, because a damaged faiss file can crash the process. The same holds for
        inverted lists in a file of their own, which is always memory-mapped: damaged lists give other results.

        Args:
            folder: folder of the index.
            verify: "size" (default) checks the size of every file, "hash" also its sha256.
            mmap: memory-map the index instead of loading it, for indexes larger than memory. Such an index can be
                searched but not changed. Default False.
            progress: called with the number of bytes just checked.

        Raises:
            InputError: `folder` contains no index, or a damaged one.
        """
        index = cls(read_manifest(Path(folder), INDEX), mmap=mmap)
        verify_files(index.manifest, "size")
        if verify == "hash":
            index.check(progress)
        else:
            mapped = {FAISS_FILE: mmap, LISTS_FILE: True, FIELDS_FILE: True}
            index.check(
                progress,
                [
                    name
                    for name, entry in index.manifest.files.items()
                    if name in mapped and not (mapped[name] and entry.bytes > HASHED_MMAP_BYTES)
                ],
            )
        index.open_files()
        return index

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, factory={self.factory!r}, rows={self.rows}, dim={self.dim})"

    def open_files(self) -> None:
        """Open the files that a search reads; otherwise they are opened on first use.

        Opened files stay those of this index after another one has replaced the folder.

        Raises:
            InputError: a file cannot be read, or contradicts the manifest.
        """
        _ = self.faiss, self._passages, self.columns, self.ids[0] if self.rows else ""

    def check(self, progress: Callable[[int], None] | None = None, names: Sequence[str] | None = None) -> None:
        """Verify the sha256 of files; files that have not changed since they were last verified are skipped.

        Every command that computes results from an index calls this first.

        Args:
            progress: called with the number of bytes just checked.
            names: names of the files; None: all.

        Raises:
            InputError: a file is missing or damaged; the message names it.
        """
        states = {name: file_state(self.folder / name) for name in (self.manifest.files if names is None else names)}
        left = {name: state for name, state in states.items() if state is None or self._checked.get(name) != state}
        verify_files(self.manifest.of(list(left)), "hash", progress)
        self._checked.update({name: state for name, state in left.items() if state is not None})

    def to(
        self,
        device: str,
        *,
        spread: Spread = "auto",
        optional: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> Index:
        """Search on another device from now on. The index stays in main memory, where filtered searches and searches
        for more than 2,048 results run.

        Args:
            device: "cpu", "cuda:1" for one GPU, or "cuda" for all of them.
            spread: how several GPUs are used. "shards": each holds a part of the index, and all search for every
                query. "replicas": each holds all of it, and searches for a part of the queries. Default: "auto", one
                GPU if it holds the index, else shards.
            optional: search on the CPU where GPUs cannot search this index. Default: False, that is an error.
            note: called with a line of text that says where searches run, and why.

        Returns:
            The index itself.

        Raises:
            NotOnGpu: an `InputError`: this faiss has no GPU support, there is no such GPU, GPUs do not support this
                type of index, or their free memory is too small.
        """
        # Frees the memory of the copy before another is made.
        self._gpu, self._note = None, note
        if device != "cpu":
            try:
                self._gpu = to_gpus(self.faiss, device, spread)
            except NotOnGpu as error:
                if not optional:
                    raise NotOnGpu(f"{self.folder}: cannot be searched on {device}: {error}") from None
                self._say(f"searched on the CPU: {error}")
            else:
                self._say(f"searched on {self._gpu.device}")
        return self

    @property
    def device(self) -> str:
        """Where searches run: "cpu", "cuda:0", "cuda:0, cuda:1 (shards)" …"""
        return "cpu" if self._gpu is None else self._gpu.device

    def _say(self, text: str) -> None:
        if self._note is not None and text not in self._said:
            self._said.add(text)
            self._note(f"{self.folder}: {text}")

    @cached_property
    def faiss(self) -> Any:
        """The faiss index in main memory. Its ids are row numbers."""
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
    def _passages(self) -> PassageLines:
        size = self.manifest.files[PASSAGES_FILE].bytes
        return PassageLines(self.folder / PASSAGES_FILE, size, self.folder / OFFSETS_FILE, self.ids, IDS_FILE)

    def passage(self, row: int) -> Passage:
        """Read the passage of `row`, 0 to N - 1, without reading the others.

        Raises:
            IndexError: `row` is out of range.
            InputError: the line on disk is not a passage, or has the id of another row.
        """
        return self._passages[row]

    def check_model(self, model: dict[str, str]) -> None:
        """Check that queries come from the model that embedded the passages.

        Raises:
            InputError: the models differ.
        """
        for name in {**self.model, **model}:
            if self.model.get(name) != model.get(name):
                if name == "dim":
                    raise InputError(
                        f"{self.folder}: expected embeddings {_truncation(self.model)}, as in the index, found "
                        f"embeddings {_truncation(model)}"
                    )
                raise InputError(
                    f"{self.folder}: expected queries of the model that embedded its passages ({name} "
                    f"{self.model.get(name)}), found another ({name} {model.get(name)})"
                )

    @cached_property
    def columns(self) -> Columns | None:
        """The fields of the passages; None if they have none."""
        return Columns(self.folder / FIELDS_FILE, self.rows) if FIELDS_FILE in self.manifest.files else None

    def matching(self, filter: Filter) -> np.ndarray:
        """Which rows match a filter, bool [N].

        Raises:
            InputError: the passages have no such field, or its values have another type.
        """
        if self.columns is None:
            raise FilterError(
                "filter: expected passages with fields, found none in the index; `retriever encode --fields` keeps them"
            )
        return filter.mask(self.columns, self.rows)

    def _selection_of(self, filter: Filter) -> Selection:
        return Selection(self.faiss, self.matching(filter), self.factory)

    def search(
        self, queries: np.ndarray, k: int = 10, *, filter: FilterInput | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest passages of each query by inner product, with their ids.

        Passages with equal scores are sorted by id, descending (index/ties.py).

        Args:
            queries: [Q, D] float32, for example from `Model.encode_queries`.
            k: passages per query. Default: 10.
            filter: only passages whose fields match, for example `{"year": {"$gte": 2000}}` or "year>=2000 lang=en".
                Default: None, all.

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
        """Find the k nearest passages of each query by inner product.

        Passages with equal scores are sorted by id, descending, as in `exact.search` and in evaluation. A Flat index
        also breaks ties at rank k by id; other indexes return the k that faiss finds, and only their order is fixed.
        faiss and `exact.search` round differently, by about 1e-7, so that scores equal in one may differ in the other.

        Args:
            queries: [Q, D] float32.
            k: passages per query.
            filter: only passages that match. An index with lists or a graph then visits more of them, see `Selection`.

        Returns:
            scores [Q, min(k, N)] float32, descending, and rows [Q, min(k, N)] int64. An approximate index or a filter
            may find fewer passages: the remaining entries, always the last, have row -1 and score -inf.

        Raises:
            InputError: a query contains NaN or infinity, faiss returns invalid rows or scores (a damaged index), or
                the filter does not fit the passages or the type of the index.
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
        selection = None if filter is None else self._selection(filter)
        return self._search(np.ascontiguousarray(queries, np.float32), min(k, self.rows), spare, selection)

    def _search(
        self, queries: np.ndarray, k: int, spare: int, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The top k among the top k + `spare`.

        With `spare` > 0, more results are requested while a tie at rank k reaches the last of them.
        """
        asked = min(k + spare, self.rows)
        if selection is None:
            scores, rows = self._faiss_search(queries, asked)
        else:
            scores, rows = selection.search(self._faiss_search, queries, asked)
        # Large lists on disk are not verified before a search.
        searched = LISTS_FILE if LISTS_FILE in self.manifest.files else FAISS_FILE
        check_results(scores, rows, self.folder / searched, self.rows)
        scores[rows < 0] = -np.inf
        order_ties(scores, rows, self.ids)
        beyond = (scores[:, k - 1] == scores[:, -1]) & (rows[:, -1] >= 0) & (k < asked < self.rows)
        scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
        if beyond.any():
            scores[beyond], rows[beyond] = self._search(queries[beyond], k, k + 2 * spare, selection)
        return scores, rows

    def _faiss_search(self, queries: np.ndarray, k: int, parameters: Any = None) -> tuple[np.ndarray, np.ndarray]:
        try:
            if self._gpu is not None and parameters is None and k <= self._gpu.max_results:
                return self._gpu.search(queries, k)
            if self._gpu is not None:
                why = f"for more than {self._gpu.max_results:,} results" if parameters is None else "with a filter"
                self._say(f"searches {why} run on the CPU")
            scores, rows = self.faiss.search(queries, k, params=parameters)
        except RuntimeError as error:
            if parameters is not None:
                raise FilterError(f"filter: faiss cannot search {self.factory} with one: {reason(error)}") from None
            raise InputError(f"{self.folder / FAISS_FILE}: cannot be searched by faiss: {reason(error)}") from None
        return scores, rows


def _truncation(model: Mapping[str, str]) -> str:
    """How embeddings are truncated, from the fingerprint of their model."""
    return f"of the first {model['dim']} dimensions (dim {model['dim']})" if "dim" in model else "of all dimensions"
