"""Reading faiss files."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index.ann.factory import import_faiss, reason
from index.ann.layout import LISTS_FILE
from index.ann.settings import core
from index.files import InputError

# Held while faiss reads a file under a limit of its own.
_LIMITED = threading.Lock()


def read_faiss(path: Path, *, mmap: bool = False) -> Any:
    """Read a faiss file. Lists on disk are expected in the same folder and opened read-only.

    Raises:
        InputError: faiss cannot read it.
    """
    lists, rest = _mmap_lists_flag(path), getattr(import_faiss(), "IO_FLAG_MMAP_IFC", 0)
    # One flag maps inverted lists and the other everything else; for some files faiss refuses the combination.
    return _read(path, [lists | rest, lists] if mmap else [0])


def read_trained(path: Path) -> Any:
    """Read a faiss file without its vectors: a trained, empty index to which vectors can be added.

    Inverted lists are not read, whether in memory or on disk.

    Raises:
        InputError: faiss cannot read it.
    """
    faiss = import_faiss()
    # Map only the lists: other memory-mapped data cannot be reset.
    index = _read(path, [_mmap_lists_flag(path)])
    inner = core(index)
    if isinstance(inner, faiss.IndexIVF) and isinstance(
        faiss.downcast_InvertedLists(inner.invlists), faiss.OnDiskInvertedLists
    ):
        # Lists on disk cannot be reset either: replace them.
        empty = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
        inner.replace_invlists(empty, True)
        empty.this.disown()
    index.reset()
    if isinstance(inner, faiss.IndexFastScan):
        # faiss 1.15.1 does not reset this count, and would write it.
        inner.ntotal2 = 0
    return index


def _mmap_lists_flag(path: Path) -> int:
    """The faiss flag that memory-maps inverted lists; 0 for lists in a file of their own.

    Those are mapped in any case; given the flag, faiss 1.15.1 ignores that file, and the first search crashes.
    """
    return 0 if (path.parent / LISTS_FILE).exists() else int(import_faiss().IO_FLAG_MMAP)


def _read(path: Path, tries: list[int]) -> Any:
    """Read a faiss file with the first of the flags `tries` that faiss accepts for it."""
    faiss = import_faiss()
    # Tables of IVF PQ serve only L2 distances, but faiss would hold their size against the limit.
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    on_disk = (path.parent / LISTS_FILE).exists()
    for mapped in tries:
        try:
            with _byte_limit(path), silence_stdout() if on_disk else contextlib.nullcontext():
                return faiss.read_index(str(path.absolute()), flags | mapped)
        except (RuntimeError, MemoryError, UnicodeDecodeError) as error:  # a faiss message may quote invalid UTF-8
            why = reason(error)
    raise InputError(f"{path}: cannot be read by faiss: {why}")


@contextlib.contextmanager
def _byte_limit(path: Path) -> Iterator[None]:
    """No part of a file is larger than the file; faiss would reserve what a damaged one states.

    The limit is one of the process: afterwards, other files are read as before.
    """
    faiss = import_faiss()
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    with _LIMITED:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(1, path.stat().st_size))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


@contextlib.contextmanager
def silence_stdout() -> Iterator[None]:
    """Discard what is written to standard output (file descriptor 1), including output of C++ code."""
    sys.stdout.flush()
    saved, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(devnull)
