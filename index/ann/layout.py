"""The files of an index folder, and writing them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.fields.columns import write_columns
from index.files import InputError
from index.files.checksums import HashingFile
from index.manifest import INDEX, FileEntry, Manifest, entries, read_manifest, write_manifest

FAISS_FILE = "index.faiss"
IDS_FILE = "ids.txt"
PASSAGES_FILE = "passages.jsonl"
OFFSETS_FILE = "passages.offsets.npy"
FILES = (FAISS_FILE, IDS_FILE, PASSAGES_FILE, OFFSETS_FILE)

LISTS_FILE = "lists.ivfdata"
"""Inverted lists, for an index whose lists stay on disk."""
CURVE_FILE = "recall.png"
"""Plot of the recall curve measured by tuning."""
FIELDS_FILE = "fields.parquet"
"""Columns of the passages' fields, if they have some."""
OPTIONAL_FILES = (LISTS_FILE, CURVE_FILE, FIELDS_FILE)


# Bytes of ids or passages processed at once.
BLOCK_BYTES = 2**24


def check_replaceable(out: Path) -> None:
    """Check that `out` is new, empty or an index, so that a mistyped path does not delete other files.

    Raises:
        InputError: `out` contains something else.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        try:
            read_manifest(out, INDEX)
        except InputError as error:
            raise InputError(f"{error}; remove it or choose another folder") from None


def finish(folder: Path, fields: dict[str, Any], faiss_sha256: str) -> None:
    """Write the manifest of an index whose other files are in `folder`; `faiss_sha256` is from `write_faiss`."""
    faiss_file = {FAISS_FILE: FileEntry((folder / FAISS_FILE).stat().st_size, faiss_sha256)}
    names = [name for name in (*FILES[1:], *OPTIONAL_FILES) if (folder / name).exists()]
    write_manifest(Manifest(folder, INDEX, fields, {**faiss_file, **entries(folder, names)}))


def write_faiss(index: Any, path: Path) -> str:
    """Write a faiss file; return its sha256."""
    faiss = import_faiss()
    # Through a Python file: faiss's own writer only prints a message when the disk is full and the file is truncated.
    with HashingFile(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return file.sha256


def write_passages(
    ids: Sequence[Path], passages: Sequence[Path], rows: int, folder: Path, keep: np.ndarray | None = None
) -> None:
    """Write the ids, the passages, the byte offset of each passage line, and the columns of their fields.

    Args:
        ids: files of ids, one per line, in the order of the rows.
        passages: files of passages as JSON lines, in the same order.
        rows: total number of lines.
        folder: folder of the index.
        keep: [rows] bool, the rows to write; None: all.

    Raises:
        InputError: the files have another number of lines, or a field has values of different types.
    """
    keep = np.ones(rows, bool) if keep is None else keep
    with open(folder / IDS_FILE, "wb") as out:
        for lines, _ in _kept_lines(ids, keep, "ids"):
            out.write(lines.data)
    offsets = np.empty(int(keep.sum()), np.uint64)
    row = position = 0
    with open(folder / PASSAGES_FILE, "wb") as out:
        for lines, lengths in _kept_lines(passages, keep, "passages"):
            out.write(lines.data)
            offsets[row : row + len(lengths)] = position + np.cumsum(lengths) - lengths
            row, position = row + len(lengths), position + len(lines)
    with open(folder / OFFSETS_FILE, "wb") as out:
        np.save(out, offsets, allow_pickle=False)
    write_columns(folder / PASSAGES_FILE, folder / FIELDS_FILE)


def _kept_lines(files: Sequence[Path], keep: np.ndarray, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (bytes of the kept lines [B] uint8, length of each line), one block of a file at a time."""
    row = 0
    for path in files:
        rest = b""
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                block = rest + block
                complete = block.rfind(b"\n") + 1
                rest = block[complete:]
                lines = np.frombuffer(block, np.uint8, complete)
                lengths = np.diff(np.flatnonzero(lines == ord("\n")) + 1, prepend=0)
                chosen = keep[row : row + len(lengths)]
                row += len(lengths)
                if row > len(keep):
                    raise InputError(f"{path}: expected {len(keep)} {what} in all, found more")
                if chosen.all():
                    yield lines, lengths
                else:
                    yield lines[np.repeat(chosen, lengths)], lengths[chosen]
        if rest:
            raise InputError(f"{path}: expected {what}, one per line, found a last line without an end")
    if row != len(keep):
        raise InputError(f"{files[-1] if files else 'index'}: expected {len(keep)} {what} in all, found {row}")


def copy_rows(source: Path, folder: Path) -> None:
    """Copy the ids and passages of the index in `source` to `folder`."""
    for name in (IDS_FILE, PASSAGES_FILE, OFFSETS_FILE, FIELDS_FILE):
        if name != FIELDS_FILE or (source / name).exists():
            shutil.copyfile(source / name, folder / name)
