"""IVF indexes whose inverted lists stay on disk: filled in groups that fit in memory, then merged by faiss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.faiss_file import read_faiss, silence_stdout
from index.ann.layout import LISTS_FILE, write_faiss
from index.ann.settings import index_layers
from index.files import InputError
from index.files.disk_space import reserve
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
    _write_lists(lists, sources, [each.ntotal for each in indexes], folder / LISTS_FILE)
    index.ntotal = inner.ntotal = sum(each.ntotal for each in indexes)
    inner.replace_invlists(lists, True)
    lists.this.disown()
    # The folder will be renamed to `final`. `read_faiss` looks next to index.faiss; plain faiss uses this path.
    lists.filename = str(final.resolve() / LISTS_FILE)


def _write_lists(lists: Any, sources: Sequence[Any], rows_of_each: Sequence[int], path: Path) -> None:
    """Write the lists of several sources, with the row numbers of each shifted by the rows of the preceding ones.

    The space is reserved first, and the file is written as any other. faiss's own `merge_from_multiple` writes through
    a memory map: a full disk ends the process with SIGBUS. Its `shift_ids` (1.15.1) adds wrong offsets, which are right
    only for two sources of equal size.

    Raises:
        OSError: the disk is full.
    """
    faiss = import_faiss()
    sizes = [[source.list_size(number) for source in sources] for number in range(lists.nlist)]
    with silence_stdout():
        lists.update_totsize(sum(map(sum, sizes)) * (lists.code_size + 8))
    reserve(path, lists.totsize)
    firsts = np.cumsum([0, *rows_of_each])
    lists.lists.clear()
    with open(path, "r+b") as file:
        for number, counts in enumerate(sizes):
            entry = faiss.OnDiskOneList()
            entry.size = entry.capacity = sum(counts)
            entry.offset = file.tell()
            lists.lists.push_back(entry)
            for source, count in zip(sources, counts, strict=True):
                if count:
                    file.write(faiss.rev_swig_ptr(source.get_codes(number), count * lists.code_size).data)
            for source, count, first in zip(sources, counts, firsts[:-1], strict=True):
                if count:
                    file.write((faiss.rev_swig_ptr(source.get_ids(number), count) + first).data)
