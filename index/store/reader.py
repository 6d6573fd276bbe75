"""Reading embedding stores through memory maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from index.files import InputError
from index.manifest import EMBEDDINGS, NAME, Level, Manifest, read_manifest, verify_files
from index.passages import Passage, read_stored_passages
from index.store.ids import Ids
from index.store.shards import DTYPES, QUANTIZED, SUFFIXES, read_codes, read_vectors


class EmbeddingStore:
    """An embedding store on disk, read through memory maps. Created by `EmbeddingStore.open`.

    Attributes:
        folder: folder of the store.
        manifest: its manifest.
        rows: N, the number of passages.
        dim: D, the length of a vector.
        dtype: "float32" or "float16" as stored, or "int8" or "binary": codes of unit vectors.
        shard_rows: rows per shard; the last shard may have fewer.
        model: identifies the model that computed the vectors (its sha256).
        source: what was embedded (file, checksum, prompt).
        complete: whether the store was closed by its writer.
        checked: whether this process has verified (or written) every byte of its files.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.folder = manifest.folder
        self.manifest = manifest
        self.dim = manifest.count("dim")
        self.rows = manifest.count("rows")
        self.shard_rows = manifest.count("shard_rows")
        self.model = manifest.texts("model")
        self.source = manifest.field("source", dict)
        self.complete = manifest.field("complete", bool)
        self.dtype = manifest.field("dtype", str)
        place = manifest.folder / NAME
        if self.dtype not in DTYPES:
            raise InputError(f"{place}: expected a dtype of {', '.join(DTYPES)}, found {self.dtype!r:.60}")
        if not self.dim or not self.shard_rows:
            raise InputError(f"{place}: expected 'dim' and 'shard_rows' above 0, found {self.dim}, {self.shard_rows}")
        shards = -(-self.rows // self.shard_rows)
        # Compare counts first: a damaged number of rows must not make us build a huge list of names.
        if len(manifest.files) != shards * len(SUFFIXES) or set(manifest.files) != set(self._names(shards)):
            raise InputError(f"{place}: expected the files of {shards} shards, found {len(manifest.files)} others")
        self._shards = shards
        self.checked = False

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.folder)!r}, rows={self.rows}, dim={self.dim}, dtype={self.dtype!r})"

    @classmethod
    def open(cls, folder: Path | str, *, verify: Level = "size") -> EmbeddingStore:
        """Open the store in `folder`.

        Args:
            folder: folder of the store.
            verify: "size" checks the size of every file, "hash" also its sha256.

        Raises:
            InputError: `folder` contains no store, an incomplete one or a damaged one.
        """
        manifest = read_manifest(Path(folder), EMBEDDINGS)
        store = cls(manifest)
        verify_files(manifest, "size")
        if not store.complete:
            raise InputError(
                f"{folder}: incomplete, {store.rows} rows so far; run the same encode again to continue it"
            )
        if verify == "hash":
            store.check()
        return store

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Verify the sha256 of every file, once per process.

        Every command that computes results from a store calls this first; `open` checks only file sizes by default.

        Args:
            progress: called with the number of bytes just checked.

        Raises:
            InputError: a file is missing or damaged; the message names it.
        """
        if not self.checked:
            verify_files(self.manifest, "hash", progress)
            self.checked = True

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors) of every shard, in order.

        `vectors` is [n, D] of the stored dtype, memory-mapped and read-only; of codes it is [n, D] float32.

        Raises:
            InputError: a shard is not the array that the manifest describes.
        """
        for number, path in enumerate(self.files("npy")):
            first = number * self.shard_rows
            shape = (min(self.shard_rows, self.rows - first), self.dim)
            yield first, read_vectors(path, self.dtype, shape)

    def codes(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, codes) of every shard of an "int8" or "binary" store, memory-mapped and read-only.

        Raises:
            InputError: the store has another dtype, or a shard is damaged.
        """
        if self.dtype not in QUANTIZED:
            raise InputError(f"{self.folder}: expected codes ({' or '.join(QUANTIZED)}), found {self.dtype}")
        for number, path in enumerate(self.files("npy")):
            first = number * self.shard_rows
            yield first, read_codes(path, self.dtype, (min(self.shard_rows, self.rows - first), self.dim))

    def vectors(self) -> np.ndarray:
        """Load all vectors into memory: [N, D] as `shards` gives them. Use `shards` for stores of any size."""
        matrix = np.empty((self.rows, self.dim), np.float32 if self.dtype in QUANTIZED else DTYPES[self.dtype])
        for first, vectors in self.shards():
            matrix[first : first + len(vectors)] = vectors
        return matrix

    def ids(self) -> Ids:
        """All ids by row, left on disk.

        Raises:
            InputError: a shard has another number of ids than rows.
        """
        files = enumerate(self.files("ids"))
        return Ids([(path, min(self.shard_rows, self.rows - number * self.shard_rows)) for number, path in files])

    def passages(self) -> Iterator[Passage]:
        """Stream all passages, by row."""
        for path in self.files("jsonl"):
            yield from read_stored_passages(path)

    def files(self, suffix: Literal["npy", "ids", "jsonl"]) -> list[Path]:
        """Paths of the shard files, in order: vectors ("npy"), ids ("ids") or passages ("jsonl")."""
        return [self.folder / f"{number:05d}.{suffix}" for number in range(self._shards)]

    @staticmethod
    def _names(shards: int) -> Iterator[str]:
        for number in range(shards):
            for suffix in SUFFIXES:
                yield f"{number:05d}.{suffix}"
