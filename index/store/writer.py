"""Writing embedding stores: fixed-size shards, and a manifest that lists the complete ones. Interrupted runs resume."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from index.files import InputError, locked_folder
from index.manifest import EMBEDDINGS, NAME, FileEntry, Manifest, read_manifest, verify_files, write_manifest
from index.passages import Passage
from index.store.duplicate_ids import DuplicateFinder
from index.store.ids import Ids
from index.store.reader import EmbeddingStore
from index.store.shards import DTYPES, ShardBuffer, passage_line, stored_vectors

SHARD_FILE = re.compile(r"\d{5,}\.(npy|ids|jsonl)")
TEMPORARY_FILE = re.compile(r"\.(manifest\.json|\d{5,}\.(npy|ids|jsonl))\.[0-9a-f]{8}\.tmp")


class EmbeddingWriter:
    """Writes passages and their vectors to an embedding store, shard by shard. An interrupted run can be resumed.

    After opening, `rows` is the number of rows already on disk: skip as many passages and append the rest. Only
    complete shards count; rows of an unfinished shard are lost when the process is killed. As a context manager, normal
    exit closes the store, and an exception keeps the complete shards only. Before anything is added to an existing
    store, every byte of it is checked.

    Memory: the rows of the current shard. Ids take 8 bytes each, most of them on disk (duplicate_ids.py).

    Args:
        folder: folder of the store; created if missing.
        dim: D, the length of a vector.
        model: identifies the model (its sha256). Vectors of different models cannot be mixed in a store.
        source: what is embedded (file, checksum, prompt); any JSON object.
        dtype: "float32" (default) or "float16" as stored, or "int8" or "binary": codes of unit vectors.
        shard_rows: rows per shard; default 65536.
        same_rows: called if an incomplete store was begun with another `source`: whether the new source begins with the
            passages already stored. If so, the store is continued with the new source.
        checked: called with the number of bytes of the existing store just checked.

    Raises:
        InputError: `folder` contains something else, a store with other arguments or a damaged one, or another process
            is writing to it.
        ValueError: `dim`, `dtype` or `shard_rows` is out of range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dim: int,
        model: dict[str, str],
        source: dict[str, Any],
        dtype: Literal["float32", "float16", "int8", "binary"] = "float32",
        shard_rows: int = 65536,
        same_rows: Callable[[EmbeddingStore], bool] | None = None,
        checked: Callable[[int], None] | None = None,
    ) -> None:
        if dim < 1 or shard_rows < 1:
            raise ValueError(f"dim, shard_rows: expected numbers above 0, found {dim}, {shard_rows}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
        self.folder = folder
        self.dim = dim
        self.shard_rows = shard_rows
        self._same_rows = same_rows
        self._checked = checked
        # Round trip through JSON (tuples become lists), so that it compares equal to the manifest on resuming.
        header = {"dim": dim, "dtype": dtype, "model": model, "source": source, "shard_rows": shard_rows}
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._resources = contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._resources.enter_context(locked_folder(folder))
        self._duplicates = DuplicateFinder(folder)
        try:
            self._manifest = self._resume() if (folder / NAME).exists() else self._create()
        except BaseException:
            self._resources.close()
            raise
        self._buffer = ShardBuffer()
        self._released = False

    @property
    def rows(self) -> int:
        """Rows on disk in complete shards."""
        return self._manifest.count("rows")

    @property
    def complete(self) -> bool:
        """Whether the store was closed, by this process or an earlier one."""
        return self._manifest.field("complete", bool)

    def append(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Add passages and their vectors. If any of them is refused, none is added.

        Args:
            passages: n passages.
            vectors: [n, D], any floating dtype.

        Raises:
            InputError: an id is a duplicate or invalid, a vector contains NaN, infinity or a value too large for the
                dtype, or a text cannot be written as UTF-8; the message names the id and the row.
            ValueError: `vectors` has another shape, or the store is complete.
            OSError: the disk is full.
        """
        first = self.rows + len(self._buffer)
        lines = [passage_line(passage, f"{self.folder}: row {first + n}") for n, passage in enumerate(passages)]
        self.append_lines([passage.id for passage in passages], lines, vectors)

    def append_lines(self, ids: list[str], lines: Sequence[bytes], vectors: np.ndarray) -> None:
        """`append` for passages that are already serialized.

        Args:
            ids: n ids.
            lines: n passages as returned by `passage_line`.
            vectors: [n, D], any floating dtype.

        Raises:
            InputError: an id is a duplicate, or a vector cannot be stored, as in `append`.
            ValueError: `vectors` has another shape, or the store is complete.
            OSError: the disk is full.
        """
        if self.complete:
            raise ValueError(f"{self.folder}: the store is complete, nothing can be appended")
        if not len(ids) == len(lines) == len(vectors) or vectors.shape[1:] != (self.dim,):
            raise ValueError(f"vectors: expected shape {(len(ids), self.dim)}, found {vectors.shape}")
        first = self.rows + len(self._buffer)
        stored = stored_vectors(vectors, self._header["dtype"], ids, self.folder, first)
        self._check_new_ids(ids, first)
        for start, stop in self._split_at_shards(len(ids)):
            self._buffer.add(ids[start:stop], stored[start:stop], lines[start:stop])
            if len(self._buffer) == self.shard_rows:
                self._write_shard(complete=False)

    def adopt_shard(self, rows: int, files: dict[str, FileEntry]) -> None:
        """Add the next shard, which another process has already written to this folder with `ShardBuffer.write`.

        Args:
            rows: rows of the shard.
            files: what `ShardBuffer.write` returned.

        Raises:
            InputError: an id is a duplicate, or the files do not exist here.
            ValueError: appended rows are still in memory, or the store is complete.
        """
        if self.complete or len(self._buffer):
            raise ValueError(f"{self.folder}: expected a store with nothing in memory and not complete")
        for name, entry in files.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise InputError(
                    f"{path}: expected the file that another process wrote; do all processes use the same folder?"
                )
        (ids,) = (name for name in files if name.endswith(".ids"))
        self._check_new_ids(list(Ids([(self.folder / ids, rows)])), self.rows)
        self._add_to_manifest(rows, files, complete=False)

    def close(self) -> None:
        """Write the last shard, which may be shorter, and mark the store complete. No-op for a complete store."""
        try:
            if not self.complete:
                self._write_shard(complete=True)
        finally:
            self._release()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        self._released = True
        self._buffer = ShardBuffer()
        self._resources.close()

    def _create(self) -> Manifest:
        # The manifest is the first file written to a store: without it, other files in the folder are not ours.
        for path in self.folder.iterdir():
            if not TEMPORARY_FILE.fullmatch(path.name):
                raise InputError(
                    f"{self.folder}: expected an empty folder or an embedding store, found {path.name}; "
                    "choose another folder"
                )
        manifest = Manifest(self.folder, EMBEDDINGS, {**self._header, "rows": 0, "complete": False}, {})
        self._remove_leftovers(manifest)
        write_manifest(manifest)
        return manifest

    def _resume(self) -> Manifest:
        manifest = read_manifest(self.folder, EMBEDDINGS)
        store = EmbeddingStore(manifest)
        others = [name for name, ours in self._header.items() if manifest.fields.get(name) != ours]
        corrected = others == ["source"] and self._same_rows is not None and not store.complete
        if others and not corrected:
            raise self._mismatch_error(others[0], manifest)
        verify_files(manifest, "hash", self._checked)
        if corrected and self._same_rows is not None and not self._same_rows(store):
            raise self._mismatch_error("source", manifest)
        self._remove_leftovers(manifest)
        if not store.complete:
            ids = store.ids()
            for start in range(0, len(ids), self.shard_rows):
                self._duplicates.add(ids[start : start + self.shard_rows])
        return manifest

    def _mismatch_error(self, name: str, manifest: Manifest) -> InputError:
        ours, theirs = _difference(self._header[name], manifest.fields.get(name))
        return InputError(
            f"{self.folder}: was begun with another {name} ({theirs}, now {ours}); "
            "remove the folder or choose another folder"
        )

    def _remove_leftovers(self, manifest: Manifest) -> None:
        """Remove temporary files and unlisted shard files of a killed run."""
        for path in self.folder.iterdir():
            unlisted = SHARD_FILE.fullmatch(path.name) and path.name not in manifest.files
            if unlisted or TEMPORARY_FILE.fullmatch(path.name):
                path.unlink()

    def _check_new_ids(self, ids: list[str], first: int) -> None:
        for position in self._duplicates.possible_duplicates(ids):
            known = [*self.ids_on_disk(), *self._buffer.ids, *ids[:position]]
            if (duplicate := ids[position]) in known:
                raise InputError(
                    f"{self.folder}: expected unique ids, found {duplicate!r} in rows {known.index(duplicate)} and "
                    f"{first + position} (counted from 0)"
                )
        self._duplicates.add(ids)

    def ids_on_disk(self) -> Ids:
        """The ids of the rows in complete shards, in order."""
        return EmbeddingStore(self._manifest).ids()

    def _split_at_shards(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) ranges of `count` new rows, split where a shard ends."""
        start = 0
        while start < count:
            stop = min(count, start + self.shard_rows - len(self._buffer))
            yield start, stop
            start = stop

    def _write_shard(self, *, complete: bool) -> None:
        files = self._buffer.write(self.folder, self.rows // self.shard_rows) if len(self._buffer) else {}
        self._add_to_manifest(len(self._buffer), files, complete=complete)
        self._buffer = ShardBuffer()

    def _add_to_manifest(self, rows: int, files: dict[str, FileEntry], *, complete: bool) -> None:
        """Add the files of a shard to the manifest."""
        if self._released:
            raise ValueError(f"{self.folder}: no longer held by this writer")
        fields = {**self._header, "rows": self.rows + rows, "complete": complete}
        manifest = Manifest(self.folder, EMBEDDINGS, fields, {**self._manifest.files, **files})
        write_manifest(manifest)
        self._manifest = manifest


def _difference(ours: Any, theirs: Any) -> tuple[str, str]:
    """Two unequal header values, for an error message; of objects only the first unequal entry."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
        ours, theirs = {name: ours.get(name)}, {name: theirs.get(name)}
    return f"{ours!r:.100}", f"{theirs!r:.100}"
