"""Writing embeddings to disk: fixed-size shards, each whole or absent, and a manifest that names the whole ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from index.duplicate_ids import SeenIds
from index.files import InputError, locked_folder
from index.manifest import EMBEDDINGS, NAME, FileEntry, Manifest, read_manifest, verify_files, write_manifest
from index.passages import Passage
from index.store.ids import Ids
from index.store.reader import EmbeddingStore
from index.store.shards import DTYPES, ShardBuffer, passage_line, stored_vectors

SHARD_FILE = re.compile(r"\d{5,}\.(npy|ids|jsonl)")
TEMPORARY_FILE = re.compile(r"\.(manifest\.json|\d{5,}\.(npy|ids|jsonl))\.[0-9a-f]{8}\.tmp")


class EmbeddingWriter:
    """Writes passages and their vectors to `folder`, shard by shard; a run that was killed goes on where it stopped.

    On opening, `rows` says how many rows are already on disk: the caller skips as many passages and appends the rest.
    Rows count only once their shard is whole; what stood in memory is embedded again. Used as a context manager,
    leaving it normally closes the store, and leaving it by an exception keeps the whole shards and nothing else.
    What is already on disk is read and checked, every byte, before anything is added to it or it is used again.
    Memory: the rows of the shard begun; of all ids eight bytes each, on disk (duplicate_ids.py).

    Args:
        folder: the store; made when missing.
        dim: D, the length of a vector.
        dtype: "float32" or "float16", as stored.
        model: what identifies the model (its sha256). Vectors of models that differ in it never mix.
        source: what was embedded (file, checksum, prompt); any JSON object.
        shard_rows: rows a shard.
        checked: called with the number of bytes each time some of what is already there were checked.
        same_rows: asked, where an incomplete store was begun with another source, whether all that it holds stands at
            the beginning of this one: then this one's it becomes.

    Raises:
        InputError: `folder` holds something else, a store of another header, a damaged one, or is being written by
            another process.
        ValueError: `dim`, `dtype` or `shard_rows` is out of range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dim: int,
        model: dict[str, str],
        source: dict[str, Any],
        dtype: Literal["float32", "float16"] = "float32",
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
        # As JSON gives it back (tuples become lists), so that it compares equal on resuming.
        header = {"dim": dim, "dtype": dtype, "model": model, "source": source, "shard_rows": shard_rows}
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._held = contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked_folder(folder))
        self._seen = SeenIds(folder)
        try:
            self._manifest = self._resume() if (folder / NAME).exists() else self._begin()
        except BaseException:
            self._held.close()
            raise
        self._buffer = ShardBuffer()
        self._released = False

    @property
    def rows(self) -> int:
        """Rows whole on disk: a multiple of `shard_rows` until the last shard is there."""
        return self._manifest.count("rows")

    @property
    def complete(self) -> bool:
        """Whether the store was closed, by this run or an earlier one."""
        return self._manifest.field("complete", bool)

    def append(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Add `passages` (n of them) with their `vectors` [n, D], any floating dtype.

        Nothing of them is added when one of them is refused.

        Raises:
            InputError: an id is a duplicate or unfit, a vector holds NaN or infinity or does not fit the dtype, a
                text cannot be written as UTF-8; the message names the id and the row.
            ValueError: `vectors` has another shape, or the store is complete.
            OSError: the disk is full.
        """
        first = self.rows + len(self._buffer)
        lines = [passage_line(passage, f"{self.folder}: row {first + n}") for n, passage in enumerate(passages)]
        self.append_lines([passage.id for passage in passages], lines, vectors)

    def append_lines(self, ids: list[str], lines: Sequence[bytes], vectors: np.ndarray) -> None:
        """`append` of passages that are `passage_line`s already, with their ids.

        Raises:
            as `append`, but for ids and texts, which passage_line has looked at.
        """
        if self.complete:
            raise ValueError(f"{self.folder}: the store is complete, nothing can be appended")
        if not len(ids) == len(lines) == len(vectors) or vectors.shape[1:] != (self.dim,):
            raise ValueError(f"vectors: expected shape {(len(ids), self.dim)}, found {vectors.shape}")
        first = self.rows + len(self._buffer)
        stored = stored_vectors(vectors, self._header["dtype"], ids, self.folder, first)
        self._enter_ids(ids, first)
        for start, stop in self._pieces(len(ids)):
            self._buffer.add(ids[start:stop], stored[start:stop], lines[start:stop])
            if len(self._buffer) == self.shard_rows:
                self._write_shard(complete=False)

    def adopt_shard(self, rows: int, files: dict[str, FileEntry]) -> None:
        """Take in the next shard, of `rows` rows, that another process has written here with a ShardBuffer.

        Raises:
            InputError: an id is a duplicate, or the files are not here.
            ValueError: rows were appended and are not in a shard yet, or the store is complete.
        """
        if self.complete or len(self._buffer):
            raise ValueError(f"{self.folder}: expected a store with nothing in memory and not complete")
        for name, entry in files.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise InputError(f"{path}: expected what another process wrote; do all of them see one folder?")
        (ids,) = (name for name in files if name.endswith(".ids"))
        self._enter_ids(list(Ids([(self.folder / ids, rows)])), self.rows)
        self._list(rows, files, complete=False)

    def close(self) -> None:
        """Write the last, shorter shard and mark the store complete. Closing a complete store does nothing."""
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
        self._held.close()

    def _begin(self) -> Manifest:
        # The manifest is the first file of a store, so without one a file of another name is not ours to touch.
        for path in self.folder.iterdir():
            if not TEMPORARY_FILE.fullmatch(path.name):
                raise InputError(
                    f"{self.folder}: expected an empty folder or an embedding store, found {path.name}; "
                    "choose another --out"
                )
        manifest = Manifest(self.folder, EMBEDDINGS, {**self._header, "rows": 0, "complete": False}, {})
        self._clean(manifest)
        write_manifest(manifest)
        return manifest

    def _resume(self) -> Manifest:
        manifest = read_manifest(self.folder, EMBEDDINGS)
        store = EmbeddingStore(manifest)
        others = [name for name, ours in self._header.items() if manifest.fields.get(name) != ours]
        corrected = others == ["source"] and self._same_rows is not None and not store.complete
        if others and not corrected:
            raise self._begun_with_another(others[0], manifest)
        verify_files(manifest, "hash", self._checked)
        if corrected and self._same_rows is not None and not self._same_rows(store):
            raise self._begun_with_another("source", manifest)
        self._clean(manifest)
        if not store.complete:
            ids = store.ids()
            for start in range(0, len(ids), self.shard_rows):
                self._seen.enter(ids[start : start + self.shard_rows])
        return manifest

    def _begun_with_another(self, name: str, manifest: Manifest) -> InputError:
        ours, theirs = _difference(self._header[name], manifest.fields.get(name))
        return InputError(
            f"{self.folder}: was begun with another {name} ({theirs}, now {ours}); "
            "remove the folder or choose another --out"
        )

    def _clean(self, manifest: Manifest) -> None:
        """Remove what a killed run left: temporary files, and shard files that never entered the manifest."""
        for path in self.folder.iterdir():
            unlisted = SHARD_FILE.fullmatch(path.name) and path.name not in manifest.files
            if unlisted or TEMPORARY_FILE.fullmatch(path.name):
                path.unlink()

    def _enter_ids(self, ids: list[str], first: int) -> None:
        for place in self._seen.suspects(ids):
            known = [*self._ids_on_disk(), *self._buffer.ids, *ids[:place]]
            if (duplicate := ids[place]) in known:
                raise InputError(
                    f"{self.folder}: expected unique ids, found {duplicate!r} in rows {known.index(duplicate)} and "
                    f"{first + place} (counted from 0)"
                )
        self._seen.enter(ids)

    def _ids_on_disk(self) -> Ids:
        return EmbeddingStore(self._manifest).ids()

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Cut `count` new rows at the shards' ends."""
        start = 0
        while start < count:
            stop = min(count, start + self.shard_rows - len(self._buffer))
            yield start, stop
            start = stop

    def _write_shard(self, *, complete: bool) -> None:
        files = self._buffer.write(self.folder, self.rows // self.shard_rows) if len(self._buffer) else {}
        self._list(len(self._buffer), files, complete=complete)
        self._buffer = ShardBuffer()

    def _list(self, rows: int, files: dict[str, FileEntry], *, complete: bool) -> None:
        """Add a shard's files to the manifest."""
        if self._released:
            raise ValueError(f"{self.folder}: no longer held by this writer")
        fields = {**self._header, "rows": self.rows + rows, "complete": complete}
        manifest = Manifest(self.folder, EMBEDDINGS, fields, {**self._manifest.files, **files})
        write_manifest(manifest)
        self._manifest = manifest


def _difference(ours: Any, theirs: Any) -> tuple[str, str]:
    """Two unequal header values for an error message: of objects, only their first unequal entry."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
        ours, theirs = {name: ours.get(name)}, {name: theirs.get(name)}
    return f"{ours!r:.100}", f"{theirs!r:.100}"
