"""Merging indexes with the same training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from index.ann import on_disk as lists_on_disk
from index.ann.factory import import_faiss, reason
from index.ann.faiss_file import read_faiss
from index.ann.index import Index
from index.ann.layout import (
    FAISS_FILE,
    IDS_FILE,
    LISTS_FILE,
    PASSAGES_FILE,
    check_replaceable,
    finish,
    write_faiss,
    write_passages,
)
from index.ann.settings import index_layers, set_search_defaults
from index.ann.train import empty_trained_index
from index.files import InputError, atomic_folder
from index.store.ids import duplicate_id


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    on_disk: bool = False,
    progress: Callable[[int], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> int:
    """Merge the indexes in `folders` into one index in `out`.

    Rows are concatenated in the order of `folders`: merging the parts of a store in order gives the same index as
    building it at once. Memory: the merged index and one of the others; with `on_disk` neither, because faiss merges
    lists from file to file.

    Args:
        folders: at least two indexes with the same training (`build` with `train_from`).
        out: folder of the merged index; an existing index is replaced.
        on_disk: store the inverted lists in a file of their own. Default False.
        progress: called with the number of rows just merged.
        checked: called with the number of bytes of the indexes just checked.

    Returns:
        Number of rows of the merged index.

    Raises:
        InputError: the indexes differ in training, model or factory, share an id, or are damaged; or indexes of this
            type cannot be merged.
        OSError: the disk is full.
    """
    if len(folders) < 2:
        raise InputError(f"merge: expected two indexes or more, found {len(folders)}")
    check_replaceable(out)
    indexes = [Index.open(folder, verify="hash", mmap=True, progress=checked) for folder in folders]
    _check_compatible(indexes)
    for index in indexes:
        if index.manifest.count("trained_on"):
            empty_trained_index(index)
    if (found := duplicate_id([folder / IDS_FILE for folder in folders])) is not None:
        raise InputError(f"merge: expected every id in one index alone, found {found!r} twice")
    rows = sum(index.rows for index in indexes)
    with atomic_folder(out) as folder:
        if on_disk:
            merged = _merged_on_disk(indexes, folder, out)
            if progress is not None:
                progress(rows)
        else:
            merged = _merged_in_memory(indexes, progress)
        write_passages([f / IDS_FILE for f in folders], [f / PASSAGES_FILE for f in folders], rows, folder)
        sha256 = write_faiss(merged, folder / FAISS_FILE)
        # The recall was measured on the parts, not on the merged index.
        fields = {name: field for name, field in indexes[0].manifest.fields.items() if name != "tuning"}
        sources = [source for index in indexes for source in index.manifest.field("sources", list)]
        finish(folder, {**fields, "rows": rows, "sources": sources}, sha256)
    return rows


def _check_compatible(indexes: Sequence[Index]) -> None:
    first = indexes[0]
    for other in indexes[1:]:
        other.check_model(first.model)
        for name in ("dim", "factory", "trained"):
            ours, theirs = (index.manifest.fields.get(name) for index in (first, other))
            if ours != theirs or ours is None:
                help_ = f"; build it with --train-from {first.folder}" if name == "trained" else ""
                raise InputError(
                    f"{other.folder}: expected the {name} of {first.folder} ({ours!s:.40}), found {theirs!s:.40}{help_}"
                )


def _merged_in_memory(indexes: Sequence[Index], progress: Callable[[int], None] | None) -> Any:
    for index in indexes:
        if LISTS_FILE in index.manifest.files:
            raise InputError(f"{index.folder}: has its lists on disk, expected --on-disk to merge it")
    # Read into memory, because a memory-mapped index cannot grow.
    merged = read_faiss(indexes[0].folder / FAISS_FILE)
    set_search_defaults(merged)
    if progress is not None:
        progress(indexes[0].rows)
    for index in indexes[1:]:
        other = read_faiss(index.folder / FAISS_FILE)
        try:
            _append(merged, other)
        except RuntimeError as error:
            raise InputError(
                f"{index.folder}: {type(merged).__name__} cannot be merged ({reason(error)}); Flat, SQ…, PQ… and IVF… "
                "can, with or without a refinement; search the parts together instead"
            ) from None
        if progress is not None:
            progress(index.rows)
    return merged


def _append(merged: Any, other: Any) -> None:
    """Append the vectors of `other` to `merged` layer by layer; merge_from does not support all nested indexes."""
    faiss = import_faiss()
    layers, others = list(index_layers(merged)), list(index_layers(other))
    before, rows = merged.ntotal, merged.ntotal + other.ntotal
    inner = layers[-1]
    inner.merge_from(others[-1], before if isinstance(inner, faiss.IndexIVF) else 0)
    for layer, its in zip(layers[:-1], others[:-1], strict=True):
        if isinstance(layer, faiss.IndexRefine):
            faiss.downcast_index(layer.refine_index).merge_from(faiss.downcast_index(its.refine_index), 0)
        layer.ntotal = rows


def _merged_on_disk(indexes: Sequence[Index], folder: Path, out: Path) -> Any:
    lists_on_disk.check_supported(indexes[0].faiss, "--on-disk")
    merged = empty_trained_index(indexes[0])
    lists_on_disk.merge(merged, [index.folder / FAISS_FILE for index in indexes], folder, out)
    return merged
