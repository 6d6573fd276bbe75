"""FAISS indexes of passages: built from an embedding store shard by shard, checked when opened, searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from index import factory as factories
from index.factory import import_faiss, reason
from index.files import InputError, atomic_folder, parse_json
from index.manifest import INDEX, NAME, FileEntry, Level, Manifest, read_manifest, verify_files, write_manifest
from index.passages import Passage, parse_passage
from index.records import Record
from index.shards import read_ids
from index.store import EmbeddingStore
from index.training import train

FAISS_FILE = "index.faiss"
IDS_FILE = "ids.txt"
PASSAGES_FILE = "passages.jsonl"
OFFSETS_FILE = "passages.offsets.npy"
FILES = (FAISS_FILE, IDS_FILE, PASSAGES_FILE, OFFSETS_FILE)

# Rows converted to float32 and given to faiss at once.
ROWS_AT_ONCE = 16384
# Beyond k, asked of a Flat index: ties across the cut are rarely longer.
SPARE = 16


def build(
    store: EmbeddingStore,
    out: Path,
    *,
    factory: str = "Flat",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Index the passages of `store` by inner product into the folder `out`, which is replaced when it is an index.

    Holds the index, the training vectors and one piece of a shard in memory. Training vectors are drawn at random
    from all rows, 39 to 256 a centroid. Every byte of the store is checked first: the index gets sums of its own, and
    they must not vouch for damage.

    Args:
        factory: a faiss factory string, or "auto" to choose by size.
        seed: of the training sample and of k-means, 0 to 2**31 - 1.
        progress: called with the number of rows each time some were added.

    Raises:
        InputError: the store is empty or damaged, `seed` is out of range, `factory` is wrong or needs more training
            vectors than there are, `out` holds something that is no index, or faiss is missing.
        OSError: the disk is full.
    """
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: expected a number from 0 to {2**31 - 1}, found {seed}")
    _check_replaceable(out)
    if not store.rows:
        raise InputError(f"{store.folder}: expected passages to index, found none")
    if factory == "auto":
        factory = factories.choose(store.rows)
    index = factories.make(factory, store.dim)
    verify_files(store.manifest, "hash")
    try:
        trained_on = train(index, store, factory, seed)
        for _, vectors in _pieces(store):
            index.add(vectors)
            if progress is not None:
                progress(len(vectors))
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: cannot index {store.rows} vectors: {reason(error)}") from None
    factories.set_search_defaults(index)
    with atomic_folder(out) as folder:
        _write_faiss(index, folder / FAISS_FILE)
        _concatenate(store.files("ids"), folder / IDS_FILE)
        _write_passages(store, folder)
        fields = {
            "factory": factory,
            "metric": "inner_product",
            "rows": store.rows,
            "dim": store.dim,
            "seed": seed,
            "trained_on": trained_on,
            "model": store.model,
            "source": store.source,
        }
        files = {name: FileEntry.of(folder / name) for name in FILES}
        write_manifest(Manifest(folder, INDEX, fields, files))


class Index:
    """An index of passages on disk, opened for searching. Made by `open`."""

    def __init__(self, manifest: Manifest) -> None:
        self.folder = manifest.folder
        self.manifest = manifest
        self.factory = manifest.field("factory", str)
        self.rows = manifest.count("rows")
        self.dim = manifest.count("dim")
        self.model = manifest.texts("model")
        if set(manifest.files) != set(FILES):
            raise InputError(
                f"{manifest.folder / NAME}: expected the files {', '.join(FILES)}, "
                f"found {', '.join(manifest.files) or 'none'}"
            )

    @classmethod
    def open(cls, folder: Path, *, verify: Level = "size") -> Index:
        """Open the index in `folder`, checking the length of every file, or at "hash" its every byte.

        Raises:
            InputError: `folder` holds no index, or a damaged one.
        """
        manifest = read_manifest(folder, INDEX)
        index = cls(manifest)
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
        path = self.folder / FAISS_FILE
        try:
            return import_faiss().read_index(str(path))
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"{path}: cannot be read by faiss: {reason(error)}") from None

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row; read at the first use."""
        return read_ids(self.folder / IDS_FILE, self.rows)

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


def _check_replaceable(out: Path) -> None:
    """Only an index or an empty folder may be replaced: a slip in `out` must not cost anyone their files."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        try:
            read_manifest(out, INDEX)
        except InputError as error:
            raise InputError(f"{error}; remove it or choose another --out") from None


def _pieces(store: EmbeddingStore) -> Iterator[tuple[int, np.ndarray]]:
    for first, vectors in store.shards():
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + ROWS_AT_ONCE], np.float32)
            yield first + start, piece


def _write_faiss(index: Any, path: Path) -> None:
    faiss = import_faiss()
    # Through Python's file: faiss's own writer only prints that a full disk has cut its last bytes off.
    with path.open("wb") as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


def _concatenate(parts: list[Path], whole: Path) -> None:
    with open(whole, "wb") as out:
        for part in parts:
            out.write(part.read_bytes())


def _write_passages(store: EmbeddingStore, folder: Path) -> None:
    """Write the passages, one a line, and the byte at which each line begins."""
    offsets = np.empty(store.rows, np.uint64)
    row = position = 0
    with open(folder / PASSAGES_FILE, "wb") as out:
        for part in store.files("jsonl"):
            with open(part, "rb") as stream:
                for line in stream:
                    if row == store.rows:
                        raise InputError(f"{part}: expected {store.rows} passages in all, found more")
                    offsets[row] = position
                    out.write(line)
                    row += 1
                    position += len(line)
    if row != store.rows:
        raise InputError(f"{store.folder}: expected {store.rows} passages, found {row}")
    with open(folder / OFFSETS_FILE, "wb") as out:
        np.save(out, offsets, allow_pickle=False)
