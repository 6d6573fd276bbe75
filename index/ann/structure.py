"""Consistency checks of a faiss index read from disk, and of what it finds.

Inconsistent sizes would make a search read invalid memory.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.factory import import_faiss
from index.ann.settings import flat_codes, index_layers
from index.files import InputError

# Fields (size_t) of a list on disk: size, capacity, offset in the file.
LIST_FIELDS = 3


def check_structure(index: Any, path: Path, rows: int, dim: int) -> None:
    """Check the sizes within an index. faiss does not check those of lists on disk and of refinements.

    Fast, except for lists on disk below a refinement: all their ids are read, since they are used as row numbers.

    Args:
        index: the faiss index.
        path: its file, for messages.
        rows: expected number of vectors.
        dim: expected dimension.

    Raises:
        InputError: a size is wrong.
    """
    faiss = import_faiss()
    if index.ntotal != rows or index.d != dim:
        raise InputError(f"{path}: expected {rows} vectors of {dim} dimensions, found {index.ntotal} of {index.d}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise InputError(f"{path}: expected an index by inner product, found faiss's metric {index.metric_type}")
    layers = list(index_layers(index))
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
        # After `_check_lists`, because it reads those sizes.
        if (found := lists.compute_ntotal()) != rows:
            raise InputError(f"{path}: damaged: expected {rows} vectors in the lists, found {found}")


def check_results(scores: np.ndarray, rows: np.ndarray, path: Path, count: int) -> None:
    """Check the results of a search; those of a damaged index may be invalid.

    Args:
        scores: [Q, k] float32.
        rows: [Q, k] int64, -1 where fewer than k passages were found.
        path: the file that was searched, for messages.
        count: N, the number of passages.

    Raises:
        InputError: a row is out of range, or a score is NaN or infinity.
    """
    if (wrong := (rows < -1) | (rows >= count)).any():
        raise InputError(f"{path}: damaged: expected rows from 0 to {count - 1}, found row {int(rows[wrong][0])}")
    if (wrong := ~np.isfinite(scores) & (rows >= 0)).any():
        found = f"found {scores[wrong][0]} for row {int(rows[wrong][0])}"
        raise InputError(f"{path}: expected scores that are numbers, {found}: damaged, or its vectors are too long")


def _check_lists(lists: Any, code_size: int, path: Path) -> None:
    """Check that every list lies within the mapped file, and that its codes have the size the index reads."""
    if lists.code_size != code_size or lists.lists.size() != lists.nlist:
        found = f"found {lists.lists.size()} of {lists.code_size}"
        raise InputError(f"{path}: damaged: expected {lists.nlist} lists of {code_size} bytes a code, {found}")
    sizes = list_table(lists)
    end = min(int(lists.totsize), Path(lists.filename).stat().st_size if lists.filename else path.stat().st_size)
    each = int(lists.code_size) + 8
    # Divide instead of multiply: damaged numbers may be as large as 2**64 - 1, and the product would overflow.
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
    """Check that all ids are valid rows: a refinement uses them to look up its candidates."""
    faiss = import_faiss()
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            if ids.min() < 0 or ids.max() >= rows:
                file = lists.filename or path
                raise InputError(f"{file}: damaged: expected rows from 0 to {rows - 1} in list {number}, found others")


def list_table(lists: Any) -> np.ndarray:
    """Size, capacity and offset of every list on disk: [nlist, LIST_FIELDS] uint64."""
    count = lists.lists.size()
    if not count:
        return np.empty((0, LIST_FIELDS), np.uint64)
    memory = (ctypes.c_uint64 * (LIST_FIELDS * count)).from_address(int(lists.lists.data().this))
    return np.ctypeslib.as_array(memory).reshape(count, LIST_FIELDS).copy()
