"""The files of a shard of an embedding store: vectors (npy), ids (one per line), passages (JSON lines)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from index.fields.values import KEY
from index.files import InputError, atomic_path
from index.manifest import FileEntry
from index.passages import Passage, checked_id
from index.store.arrays import map_array

# Little-endian on every machine, so that a store has the same bytes everywhere.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "binary": np.dtype("u1"),
}
StoreDtype = Literal["float32", "float16", "int8", "binary"]
"""Dtype of the vectors of a store."""
QUANTIZED = ("int8", "binary")
"""Dtypes of codes, for vectors of unit length only."""
# Largest difference of a vector's length from 1.
UNIT_TOLERANCE = 0.01
SUFFIXES = ("npy", "ids", "jsonl")


class ShardBuffer:
    """The rows of a shard until it is written. Memory grows with the rows added."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._lines: list[bytes] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], vectors: np.ndarray, lines: Sequence[bytes]) -> None:
        """Add n rows.

        Args:
            ids: n ids.
            vectors: [n, D] in C order; kept, not copied.
            lines: n passages as returned by `passage_line`.
        """
        self.ids += ids
        self._vectors.append(vectors)
        self._lines += lines

    def write(self, folder: Path, number: int) -> dict[str, FileEntry]:
        """Write the rows (at least one) as shard `number` of the store in `folder`; return its manifest entries."""
        vectors, ids, passages = (f"{number:05d}.{suffix}" for suffix in SUFFIXES)
        return {
            vectors: _write_vectors(folder / vectors, self._vectors),
            ids: _write_lines(folder / ids, (f"{id_}\n".encode() for id_ in self.ids)),
            passages: _write_lines(folder / passages, self._lines),
        }


def _write_vectors(path: Path, pieces: Sequence[np.ndarray]) -> FileEntry:
    """Write `pieces`, each [n, D] in C order, as one array."""
    shape = (sum(map(len, pieces)), pieces[0].shape[1])
    header = {"descr": np.lib.format.dtype_to_descr(pieces[0].dtype), "fortran_order": False, "shape": shape}
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        # np.save bypasses Python's file objects and loses the reason of a failed write, such as a full disk.
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(piece.data)
    return FileEntry.of(path)


def _write_lines(path: Path, lines: Iterable[bytes]) -> FileEntry:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.writelines(lines)
    return FileEntry.of(path)


def stored_vectors(vectors: np.ndarray, dtype: str, ids: Sequence[str], folder: Path, first: int) -> np.ndarray:
    """Convert vectors to the dtype of a store.

    Args:
        vectors: [n, D], any floating dtype.
        dtype: a key of DTYPES.
        ids: n ids, for error messages.
        folder: folder of the store, for error messages.
        first: row of the first vector, for error messages.

    Returns:
        [n, D] of `dtype` in C order, or codes (see `quantized`).

    Raises:
        InputError: a vector contains NaN or infinity, a value too large for `dtype`, or has no unit length where codes
            are stored; the message names its id and row.
    """
    if dtype in QUANTIZED:
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        if not (unit := np.abs(lengths - 1) <= UNIT_TOLERANCE).all():
            row = int(np.argmin(unit))
            raise InputError(
                f"{folder}: row {first + row}, passage {ids[row]!r}: expected a vector of unit length for {dtype}, "
                f"found length {lengths[row]:g}"
            )
        return quantized(vectors, dtype)
    with np.errstate(over="ignore"):  # values too large for float16 become infinite and are refused below
        stored = vectors.astype(DTYPES[dtype], order="C")
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        found = "found one too large for float16" if np.isfinite(vectors[row]).all() else "found NaN or infinity"
        raise InputError(f"{folder}: row {first + row}, passage {ids[row]!r}: expected a finite vector, {found}")
    return stored


def read_vectors(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Memory-map the vectors of `path`, read-only, or decode the codes in it: [n, D] float32.

    Raises:
        InputError: the file is not an array of `dtype` and of the `shape` of n vectors of D dimensions.
    """
    if dtype in QUANTIZED:
        return dequantized(read_codes(path, dtype, shape), dtype, shape[1])
    return map_array(path, DTYPES[dtype], shape)


def read_codes(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Memory-map the codes of `path`, read-only; `shape` is that of the vectors.

    Raises:
        InputError: the file is not an array of these codes.
    """
    return map_array(path, DTYPES[dtype], (shape[0], _width(dtype, shape[1])))


def row_bytes(dtype: str, dim: int) -> int:
    """Bytes of a vector of `dim` values on disk."""
    return DTYPES[dtype].itemsize * _width(dtype, dim)


def _width(dtype: str, dim: int) -> int:
    """Numbers that are stored for a vector of `dim` values."""
    return -(-dim // 8) if dtype == "binary" else dim


def quantized(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of vectors, of which only the direction is kept.

    Args:
        vectors: [n, D] floating.
        dtype: "int8": each value as a whole number from -127 to 127, where 127 is the largest of its vector; int8
            [n, D]. "binary": whether each value is above 0, as the bits of uint8 [n, ceil(D / 8)], the first value in
            the highest bit.
    """
    vectors = vectors.astype(np.float32)
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=1)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)


def dequantized(codes: np.ndarray, dtype: str, dim: int) -> np.ndarray:
    """The vectors of codes, [n, D] float32 of unit length; zeros stay zero."""
    if dtype == "binary":
        signs = np.unpackbits(codes, axis=1, count=dim).astype(np.float32)
        return (2 * signs - 1) / np.float32(np.sqrt(dim))
    values = codes.astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1)


# Quotes a string as JSON without escaping non-ASCII characters; json.dumps takes three times as long.
_quoted = json.encoder.encode_basestring


def passage_line(passage: Passage, place: str) -> bytes:
    """The passage as a line of JSON.

    Raises:
        InputError: its id is invalid, or its text contains half of a surrogate pair; the message begins with `place`.
    """
    checked_id(passage.id, place)
    texts = map(_quoted, (passage.id, passage.title, passage.text))
    try:
        line = '{{"_id": {}, "title": {}, "text": {}'.format(*texts)
        if passage.fields:
            line += f', "{KEY}": {json.dumps(dict(passage.fields), ensure_ascii=False, allow_nan=False)}'
        return f"{line}}}\n".encode()
    except UnicodeEncodeError:
        found = f"found half of a surrogate pair in passage {passage.id!r}"
        raise InputError(f"{place}: expected Unicode text, {found}") from None
