"""Inverted lists that stay on disk: indexes larger than memory, filled group by group and merged by faiss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.index import read_faiss
from index.ann.layout import LISTS_FILE, write_faiss
from index.ann.settings import parts
from index.ann.silence_stdout import quiet
from index.files import InputError
from index.store.parts import Part

# Codes and ids held at once where no memory budget says otherwise.
BYTES_AT_ONCE = 2**30


def check_kind(index: Any, what: str) -> None:
    """Refuse an index that faiss cannot keep so.

    Raises:
        InputError: it has no inverted lists, or of a layout that faiss knows in memory alone.
    """
    faiss = import_faiss()
    for part in parts(index):
        if isinstance(part, faiss.IndexRefine):
            break
        if isinstance(part, faiss.IndexIVF) and not isinstance(part, faiss.IndexIVFFastScan):
            return
    raise InputError(f"{what}: expected IVF…,Flat, IVF…,SQ… or IVF…,PQ…, whose lists can stay on disk")


def fill(
    index: Any,
    part: Part,
    folder: Path,
    final: Path,
    memory_mib: float | None,
    put: Callable[[np.ndarray], None],
    progress: Callable[[int], None] | None,
) -> None:
    """Put the vectors of `part` into lists in `folder`, holding as many codes at once as the memory budget allows.

    Args:
        index: trained and empty; afterwards its lists are those on disk.
        part: what to add.
        folder: where the index is being written.
        final: where it will stand: plain faiss looks for the lists there.
        memory_mib: most to hold; 1 GiB when there is none.
        put: adds vectors [n, D] float32 to `index`.
        progress: called with the number of rows each time some were added.
    """
    faiss = import_faiss()
    check_kind(index, "--on-disk")
    each = faiss.extract_index_ivf(index).code_size + 8
    most = max(1, int((memory_mib * 2**20 if memory_mib else BYTES_AT_ONCE) // each))
    groups: list[Path] = []

    def write_group() -> None:
        groups.append(folder / f"group-{len(groups)}")
        write_faiss(index, groups[-1])
        index.reset()

    for vectors in part.pieces():
        if index.ntotal and index.ntotal + len(vectors) > most:
            write_group()
        put(vectors)
        if progress is not None:
            progress(len(vectors))
    write_group()
    merge(index, groups, folder, final)
    for path in groups:
        path.unlink()


def merge(index: Any, files: Sequence[Path], folder: Path, final: Path) -> None:
    """Merge the inverted lists of faiss `files`, one after the other, into lists in `folder`; rows are numbered on.

    Memory: the trained index alone; the files, and those of their lists, are mapped.

    Args:
        index: trained and empty; afterwards its lists are those on disk.
        files: of indexes trained alike, each with its lists in it or beside it.
        folder: where the index is being written.
        final: where it will stand: plain faiss looks for the lists there.
    """
    faiss = import_faiss()
    # Kept until all is copied: the lists belong to them.
    indexes = [read_faiss(path, mmap=True) for path in files]
    sources = [faiss.extract_index_ivf(each).invlists for each in indexes]
    pointers = faiss.InvertedListsPtrVector()
    for source in sources:
        pointers.push_back(source)
    inner = faiss.extract_index_ivf(index)
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(folder / LISTS_FILE))
    threads = faiss.omp_get_max_threads()
    # One thread writes the lists in their order, and so the same file every time; the disk is what takes the time.
    faiss.omp_set_num_threads(1)
    try:
        with quiet():
            index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size())
    finally:
        faiss.omp_set_num_threads(threads)
    _number_on(lists, sources, [each.ntotal for each in indexes])
    inner.replace_invlists(lists, True)
    lists.this.disown()
    # The folder is still to be renamed. Ours looks beside index.faiss; plain faiss looks where the file says.
    lists.filename = str(final.resolve() / LISTS_FILE)


def _number_on(lists: Any, sources: Sequence[Any], rows_of_each: Sequence[int]) -> None:
    """Add to every entry's row the rows of the sources before its own.

    faiss's own `shift_ids` (1.15.1) adds the sum of the later files' sizes instead, which is right for two of one size.
    """
    faiss = import_faiss()
    for number in range(lists.nlist):
        if not (size := lists.list_size(number)):
            continue
        rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
        start = first = 0
        for source, count in zip(sources, rows_of_each, strict=True):
            stop = start + source.list_size(number)
            rows[start:stop] += first
            start, first = stop, first + count
