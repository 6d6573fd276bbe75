"""The files of one shard of embeddings: vectors in npy format, ids one a line, passages as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from index.files import InputError, atomic_path
from index.manifest import FileEntry
from index.passages import Passage, checked_id

# Little-endian whatever the machine, so that a store is the same bytes everywhere.
DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
SUFFIXES = ("npy", "ids", "jsonl")


def write_vectors(path: Path, vectors: np.ndarray) -> FileEntry:
    """Write `vectors` [n, D] atomically; returns what stands on disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        # np.save writes past Python's streams and so loses the reason why a write failed; a full disk must say so.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(vectors))
        stream.write(vectors.data)
    return FileEntry.of(path)


def read_vectors(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """The vectors of `path`, memory-mapped and read-only.

    Raises:
        InputError: the file is no array of `dtype` ("float32" or "float16") and `shape`.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: expected an array in npy format, found: {error}") from None
    if not isinstance(vectors, np.ndarray):
        raise InputError(f"{path}: expected an array in npy format, found an archive")
    if vectors.dtype != DTYPES[dtype] or vectors.shape != shape:
        raise InputError(f"{path}: expected {dtype} {shape}, found {vectors.dtype} {vectors.shape}")
    return vectors


def write_lines(path: Path, lines: Iterable[bytes]) -> FileEntry:
    """Write `lines`, each with its line end, atomically; returns what stands on disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.writelines(lines)
    return FileEntry.of(path)


def read_ids(path: Path, count: int) -> list[str]:
    """The ids of a file that has one a line.

    Raises:
        InputError: there are not `count` of them, or the file is no UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, found: {error}") from None
    # Not splitlines: it would cut at more signs than the one that ends a line here.
    ids = text.split("\n")
    if ids.pop() != "" or len(ids) != count:
        raise InputError(f"{path}: expected {count} ids, one a line, found {len(ids)}")
    return ids


def passage_line(passage: Passage, place: str) -> bytes:
    """The passage as a line of JSON.

    Raises:
        InputError: its id is unfit, or its text holds half of a surrogate pair; the message begins with `place`.
    """
    checked_id(passage.id, place)
    value = {"_id": passage.id, "title": passage.title, "text": passage.text}
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        found = f"found half of a surrogate pair in passage {passage.id!r}"
        raise InputError(f"{place}: expected Unicode text, {found}") from None
