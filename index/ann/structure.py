"""What must hold of a faiss index that was read from disk: else a search could read outside its memory."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import flat_codes, parts
from index.files import InputError

# Numbers of size_t that describe a list on disk: how many entries it has, room for how many, and where it begins.
LIST_FIELDS = 3


def check_structure(index: Any, path: Path, rows: int, dim: int) -> None:
    """Check the sizes within an index, of which faiss trusts those of lists on disk and of refinements.

    Takes little time, and for lists on disk below a refinement that of reading the ids in them: those must be rows.

    Args:
        index: as read.
        path: of the file, for messages.
        rows: that it must have.
        dim: of its vectors.

    Raises:
        InputError: a size does not fit.
    """
    faiss = import_faiss()
    if index.ntotal != rows or index.d != dim:
        raise InputError(f"{path}: expected {rows} vectors of {dim} dimensions, found {index.ntotal} of {index.d}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise InputError(f"{path}: expected an index by inner product, found faiss's metric {index.metric_type}")
    layers = list(parts(index))
    for layer in layers:
        if layer.ntotal != rows:
            raise InputError(
                f"{path}: damaged: expected {rows} vectors in {type(layer).__name__}, found {layer.ntotal}"
            )
    for codes in flat_codes(index):
        if codes.ntotal != rows:
            raise InputError(f"{path}: damaged: expected {rows} codes, found {codes.ntotal}")
        if isinstance(codes, faiss.IndexFlatCodes) and codes.codes.size() != rows * codes.code_size:
            expected = f"expected codes of {rows * codes.code_size} bytes"
            raise InputError(f"{path}: damaged: {expected}, found {codes.codes.size()}")
    inner = layers[-1]
    if isinstance(inner, faiss.IndexIVF):
        lists = faiss.downcast_InvertedLists(inner.invlists)
        if lists.nlist != inner.nlist:
            raise InputError(f"{path}: damaged: expected {inner.nlist} lists, found {lists.nlist}")
        if isinstance(lists, faiss.OnDiskInvertedLists):
            _check_lists(lists, inner.code_size, path)
            if any(isinstance(layer, faiss.IndexRefine) for layer in layers):
                _check_ids(lists, path, rows)
        # After the sizes of lists on disk, which it adds up.
        if (found := lists.compute_ntotal()) != rows:
            raise InputError(f"{path}: damaged: expected {rows} vectors in the lists, found {found}")


def _check_lists(lists: Any, code_size: int, path: Path) -> None:
    """Every list must lie within the file that is mapped, and hold codes of the size that the index reads."""
    if lists.code_size != code_size or lists.lists.size() != lists.nlist:
        found = f"found {lists.lists.size()} of {lists.code_size}"
        raise InputError(f"{path}: damaged: expected {lists.nlist} lists of {code_size} bytes a code, {found}")
    sizes = list_table(lists)
    end = min(int(lists.totsize), Path(lists.filename).stat().st_size if lists.filename else path.stat().st_size)
    each = int(lists.code_size) + 8
    # Divided rather than multiplied: damaged numbers may be as large as 2**64 - 1.
    fits = (sizes[:, 0] <= sizes[:, 1]) & (sizes[:, 2] <= end)
    fits[fits] &= sizes[fits, 1] <= (end - sizes[fits, 2]) // each
    fits |= (sizes[:, :2] == 0).all(axis=1)
    if not fits.all():
        number = int(np.argmin(fits))
        size, capacity, offset = sizes[number].tolist()
        raise InputError(
            f"{path}: damaged: expected lists within {end} bytes, found list {number} of {size} entries (room for "
            f"{capacity}) of {each} bytes from byte {offset} on"
        )


def _check_ids(lists: Any, path: Path, rows: int) -> None:
    """A refinement looks its candidates up by their ids."""
    faiss = import_faiss()
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            if ids.min() < 0 or ids.max() >= rows:
                place = lists.filename or path
                raise InputError(f"{place}: damaged: expected rows from 0 to {rows - 1} in list {number}, found others")


def list_table(lists: Any) -> np.ndarray:
    """[nlist, LIST_FIELDS] uint64: size, capacity and offset of every list on disk."""
    count = lists.lists.size()
    if not count:
        return np.empty((0, LIST_FIELDS), np.uint64)
    memory = (ctypes.c_uint64 * (LIST_FIELDS * count)).from_address(int(lists.lists.data().this))
    return np.ctypeslib.as_array(memory).reshape(count, LIST_FIELDS).copy()
