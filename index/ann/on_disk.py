"""IVF indexes whose inverted lists stay on disk: filled in groups that fit in memory, then merged by faiss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.index import read_faiss
from index.ann.layout import LISTS_FILE, write_faiss
from index.ann.settings import index_layers
from index.ann.silence_stdout import silence_stdout
from index.files import InputError
from index.store.parts import Part

# Memory for codes and ids where no budget is given.
BYTES_AT_ONCE = 2**30


def check_supported(index: Any, what: str) -> None:
    """Check that the inverted lists of `index` can be stored on disk. `what` begins the error message.

    Raises:
        InputError: the index has no inverted lists, or lists of a type that faiss supports in memory only.
    """
    faiss = import_faiss()
    for part in index_layers(index):
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
    """Add the vectors of `part` to inverted lists on disk, holding no more codes in memory than the budget allows.

    Args:
        index: trained and empty; afterwards its inverted lists are those on disk.
        part: the vectors to add.
        folder: folder in which the index is being written.
        final: its path once complete: plain faiss looks for the lists there.
        memory_mib: memory budget in MiB; None: 1 GiB.
        put: adds vectors [n, D] float32 to `index`.
        progress: called with the number of rows just added.
    """
    faiss = import_faiss()
    check_supported(index, "--on-disk")
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
    """Concatenate the inverted lists of several faiss files into lists on disk, with consecutive row numbers.

    Memory: the trained index; the files and their lists are memory-mapped.

    Args:
        index: trained and empty; afterwards its inverted lists are those on disk.
        files: faiss files of indexes with the same training, with their lists in memory or on disk.
        folder: folder in which the index is being written.
        final: its path once complete: plain faiss looks for the lists there.
    """
    faiss = import_faiss()
    # The indexes own their lists: keep them alive until everything is copied.
    indexes = [read_faiss(path, mmap=True) for path in files]
    sources = [faiss.extract_index_ivf(each).invlists for each in indexes]
    pointers = faiss.InvertedListsPtrVector()
    for source in sources:
        pointers.push_back(source)
    inner = faiss.extract_index_ivf(index)
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(folder / LISTS_FILE))
    threads = faiss.omp_get_max_threads()
    # A single thread writes the lists in a fixed order, so the file is deterministic; the disk is the bottleneck.
    faiss.omp_set_num_threads(1)
    try:
        with silence_stdout():
            index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size())
    finally:
        faiss.omp_set_num_threads(threads)
    _shift_row_numbers(lists, sources, [each.ntotal for each in indexes])
    inner.replace_invlists(lists, True)
    lists.this.disown()
    # The folder will be renamed to `final`. `read_faiss` looks next to index.faiss; plain faiss uses this path.
    lists.filename = str(final.resolve() / LISTS_FILE)


def _shift_row_numbers(lists: Any, sources: Sequence[Any], rows_of_each: Sequence[int]) -> None:
    """Add to each id in the lists the number of rows of the preceding sources.

    faiss's own `shift_ids` (1.15.1) adds wrong offsets, which are right only for two sources of equal size.
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
