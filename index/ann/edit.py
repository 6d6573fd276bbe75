"""Adding passages to an index, deleting some, and tuning it again. Each operation writes a complete new folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.build import add, source_of, tuning_fields
from index.ann.factory import import_faiss, reason
from index.ann.index import Index
from index.ann.layout import (
    CURVE_FILE,
    FAISS_FILE,
    IDS_FILE,
    LISTS_FILE,
    PASSAGES_FILE,
    check_replaceable,
    copy_rows,
    finish,
    write_faiss,
    write_passages,
)
from index.ann.settings import Settings, flat_codes, index_layers, set_add_effort
from index.ann.tuning.graphs import is_graph
from index.ann.tuning.measure import measured_on_gpu
from index.ann.tuning.recall import Target, find_truth
from index.ann.tuning.result import Tuning
from index.ann.tuning.tune import tune
from index.files import InputError, atomic_folder, locked_folder, recover_folder
from index.manifest import INDEX, read_manifest
from index.store.ids import duplicate_id
from index.store.parts import Part
from index.store.prefix import truncated_like
from index.store.reader import EmbeddingStore


def add_passages(
    folder: Path,
    store: EmbeddingStore,
    out: Path | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> int:
    """Add the passages of `store` to the index in `folder`.

    New passages get the rows after the existing ones and are encoded with the index's training. A store that the index
    already contains adds nothing, so that an interrupted run can be repeated.

    Args:
        folder: folder of the index.
        store: vectors of the same model; truncated as those of the index are.
        out: folder of the new index; None (default) replaces the old one.
        progress: called with the number of rows just added.
        checked: called with the number of bytes of index and store just checked.

    Returns:
        Number of passages added.

    Raises:
        InputError: an id is already in the index, the models or dimensions differ, the index or the store is damaged,
            or the index has its lists on disk.
    """
    instead = "build an index of the new passages and merge the two"
    with _opened(folder, out, checked, "adding", instead) as index:
        store = truncated_like(store, index.model)
        index.check_model(store.model)
        if store.dim != index.dim:
            raise InputError(f"{store.folder}: expected vectors of {index.dim} dimensions, found {store.dim}")
        part = Part(store)
        source, sources = source_of(part), index.manifest.field("sources", list)
        if source in sources:
            if _is_in_place(folder, out):
                return 0
            raise InputError(f"{folder}: holds the passages of {store.folder} already")
        store.check(checked)
        if (found := duplicate_id([folder / IDS_FILE, *part.files("ids")])) is not None:
            raise InputError(f"{store.folder}: expected ids that are not yet in {folder}, found {found!r}")
        settings = Settings.of(index.faiss)
        set_add_effort(index.faiss)
        try:
            add(index.faiss.add, part, progress)
        except RuntimeError as error:
            raise InputError(f"{folder}: cannot add {part.rows} vectors: {reason(error)}") from None
        settings.apply(index.faiss)
        with _new_folder(index, out) as new:
            ids, passages = [folder / IDS_FILE, *part.files("ids")], [folder / PASSAGES_FILE, *part.files("jsonl")]
            rows = index.rows + part.rows
            write_passages(ids, passages, rows, new)
            sha256 = write_faiss(index.faiss, new / FAISS_FILE)
            _copy_curve(index, new)
            finish(new, {**index.manifest.fields, "rows": rows, "sources": [*sources, source]}, sha256)
        return part.rows


def delete_passages(
    folder: Path, ids: Sequence[str], out: Path | None = None, *, checked: Callable[[int], None] | None = None
) -> int:
    """Delete the passages with the given ids from the index in `folder`.

    The remaining rows keep their order and are renumbered without gaps. Ids that are not in the index are ignored, so
    that an interrupted run can be repeated.

    Args:
        folder: folder of the index.
        ids: ids of the passages to delete.
        out: folder of the new index; None (default) replaces the old one.
        checked: called with the number of bytes of the index just checked.

    Returns:
        Number of passages deleted.

    Raises:
        InputError: this type of index does not support deletion, no passages would be left, or the index is damaged.
    """
    instead = "build an index of the passages that are to stay"
    with _opened(folder, out, checked, "deleting", instead) as index:
        wanted = set(ids)
        keep = np.fromiter((id_ not in wanted for id_ in index.ids), bool, index.rows)
        deleted = int((~keep).sum())
        if deleted == index.rows:
            raise InputError(f"{folder}: expected passages to be left, found that all {deleted} would be deleted")
        if not deleted and _is_in_place(folder, out):
            return 0
        if deleted:
            _delete_rows(index.faiss, keep, folder)
        with _new_folder(index, out) as new:
            write_passages([folder / IDS_FILE], [folder / PASSAGES_FILE], index.rows, new, keep)
            sha256 = write_faiss(index.faiss, new / FAISS_FILE)
            _copy_curve(index, new)
            # The index no longer contains all of its sources: allow them to be added again.
            sources = [] if deleted else index.manifest.field("sources", list)
            finish(new, {**index.manifest.fields, "rows": index.rows - deleted, "sources": sources}, sha256)
        return deleted


def retune(
    folder: Path,
    store: EmbeddingStore,
    target: Target,
    *,
    seed: int = 0,
    device: str = "cpu",
    note: Callable[[str], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> Tuning:
    """Tune the search settings of the index in `folder` to a recall target. Its codes are not changed.

    Args:
        folder: folder of the index.
        store: contains the vectors of all its passages, in the same order; other passages, such as deleted ones, are
            skipped.
        target: the recall target.
        seed: seed for sampling passages as queries if the target has none. Default 0.
        device: where to measure: "cpu" (default), "cuda" or "cuda:1"; "auto" is a GPU if that is possible.
        note: called with a line of text for each measured search setting.
        checked: called with the number of bytes of index and store just checked.

    Returns:
        What was measured and chosen.

    Raises:
        InputError: `store` does not contain the passages of the index in their order, or has another model or
            dimension; the index or the store is damaged; or a graph would be measured with its own passages.
        NotOnGpu: an `InputError`: GPUs cannot search this index.
    """
    with _opened(folder, None, checked) as index:
        store = truncated_like(store, index.model)
        index.check_model(store.model)
        if store.dim != index.dim:
            raise InputError(f"{store.folder}: expected vectors of {index.dim} dimensions, found {store.dim}")
        if target.queries is None and is_graph(index.faiss):
            raise InputError(
                f"{folder}: expected queries to measure the recall of a graph with, because a passage in the graph "
                "finds its neighbors far more easily than a query does; `retriever index build --target-recall` "
                "measures with passages that are not in the graph yet"
            )
        # Recall is measured against these vectors: verify them first.
        store.check(checked)
        rows = _matching_rows(store, index)
        without = np.delete(np.arange(store.rows), rows)
        held_out = rows[target.held_out_rows(index.rows, seed)]
        on_gpu = None
        if device != "cpu":
            where = "cuda" if device == "auto" else device
            on_gpu = measured_on_gpu(index.faiss, target, note, where, optional=device == "auto")
        tuning = tune(index.faiss, find_truth(store, target, held_out, without), target, note, on_gpu)
        with _new_folder(index, None) as new:
            copy_rows(folder, new)
            if LISTS_FILE in index.manifest.files:
                (new / LISTS_FILE).hardlink_to(folder / LISTS_FILE)
            sha256 = write_faiss(index.faiss, new / FAISS_FILE)
            finish(new, {**index.manifest.fields, **tuning_fields(tuning, new, index.factory, index.rows)}, sha256)
        return tuning


def _is_in_place(folder: Path, out: Path | None) -> bool:
    return out is None or out.resolve() == folder.resolve()


@contextlib.contextmanager
def _opened(
    folder: Path,
    out: Path | None,
    checked: Callable[[int], None] | None,
    what: str | None = None,
    instead: str = "",
) -> Iterator[Index]:
    """Open the index and verify every byte of it, because the new index gets checksums of its own.

    An index that will be replaced is locked: of two processes that change it, the second would undo what the first did.

    Args:
        what: the operation, if it needs its lists in memory; None if not.
        instead: what to do where they are on disk, for the error message.
    """
    # A run killed while it replaced the folder may have left none, or the old one under a temporary name.
    recover_folder(folder)
    if out is not None:
        check_replaceable(out)
    with locked_folder(folder) if _is_in_place(folder, out) and folder.is_dir() else contextlib.nullcontext():
        index = Index.open(folder, verify="hash", progress=checked)
        if what is not None and LISTS_FILE in index.manifest.files:
            raise InputError(
                f"{folder}: {what}: expected lists in memory, found lists on disk; {instead}, with --train-from "
                f"{folder} and --on-disk"
            )
        yield index


@contextlib.contextmanager
def _new_folder(index: Index, out: Path | None) -> Iterator[Path]:
    """The folder of the changed index, which replaces the old one on success.

    Raises:
        InputError: the index to replace is no longer the one that was opened.
    """
    with atomic_folder(out or index.folder) as new:
        yield new
        # A lock belongs to the folder that was opened: `retriever index build` may have put another in its place.
        if _is_in_place(index.folder, out) and read_manifest(index.folder, INDEX) != index.manifest:
            raise InputError(f"{index.folder}: another process has replaced this index meanwhile; try again")


def _matching_rows(store: EmbeddingStore, index: Index) -> np.ndarray:
    """The rows [N] int64 of `store` that contain the passages of `index`, in the same order.

    Whole lines (id, title, text) are compared: if the text has changed, the vector has too.
    """
    stored = enumerate(_lines(store.files("jsonl")))
    rows = np.empty(index.rows, np.int64)
    for row, ours in enumerate(_lines([index.folder / PASSAGES_FILE])):
        rows[row] = next((position for position, line in stored if line == ours), -1)
        if rows[row] < 0:
            behind = f" behind {index.ids[row - 1]!r}" if row else ""
            raise InputError(
                f"{store.folder}: expected the passages of {index.folder} in their order, found no {index.ids[row]!r} "
                f"of the same text{behind} (row {row} of the index)"
            )
    return rows


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as stream:
            yield from stream


def _copy_curve(index: Index, new: Path) -> None:
    if CURVE_FILE in index.manifest.files:
        (new / CURVE_FILE).write_bytes((index.folder / CURVE_FILE).read_bytes())


def _delete_rows(index: Any, keep: np.ndarray, folder: Path) -> None:
    """Remove the rows where `keep` [N] bool is False, and renumber the others."""
    faiss = import_faiss()
    selector = faiss.IDSelectorBatch(np.flatnonzero(~keep))
    left = int(keep.sum())
    layers = list(index_layers(index))
    codes = [layers[-1], *flat_codes(index)[1:]]
    for each in codes:
        if not isinstance(each, faiss.IndexIVF | faiss.IndexFlatCodes | faiss.IndexFastScan):
            raise InputError(
                f"{folder}: {type(each).__name__} cannot delete; Flat, SQ…, PQ… and IVF… can, with or without "
                "a refinement"
            )
    for each in codes:
        try:
            each.remove_ids(selector)
        except RuntimeError as error:
            raise InputError(f"{folder}: {type(each).__name__} cannot delete: {reason(error)}") from None
        if isinstance(each, faiss.IndexIVF):
            _renumber(each, np.cumsum(keep) - 1)
    for layer in layers:
        layer.ntotal = left


def _renumber(ivf: Any, new: np.ndarray) -> None:
    """Map the ids in the inverted lists through `new`; faiss renumbers flat codes on removal, but not lists."""
    faiss = import_faiss()
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            # A view of faiss's memory: assignment changes the index.
            ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            ids[:] = new[ids]
