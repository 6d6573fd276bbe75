"""Changing an index that is there: adding passages, deleting some, tuning it anew. Each writes a whole new folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.ann.build import add, source_of, tuned
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
from index.ann.settings import Settings, flat_codes, parts, prepare_to_add
from index.ann.tuning.graphs import is_graph
from index.ann.tuning.recall import Target, find_truth
from index.ann.tuning.tune import Tuning, tune
from index.files import InputError, atomic_folder, recover_folder
from index.store.ids import duplicate_id
from index.store.parts import Part
from index.store.reader import EmbeddingStore


def add_passages(
    folder: Path,
    store: EmbeddingStore,
    out: Path | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> int:
    """Add the passages of `store` to the index in `folder`; returns how many came in.

    They get the rows after those that are there, encoded as the index was trained. A store that is in the index
    already adds nothing: a run that was killed may be run again, whether or not it had come to its end.

    Args:
        folder: the index.
        store: vectors of the same model.
        out: folder of the new index; none replaces the old one.
        progress: called with the number of rows each time some were added.
        checked: called with the number of bytes each time some of the index or the store were checked.

    Raises:
        InputError: an id is in the index already, the models or dimensions differ, one of the two is damaged, or the
            index keeps its lists on disk.
    """
    index = _opened(folder, out, checked, "adding", "build an index of the new passages and merge the two")
    index.check_model(store.model)
    if store.dim != index.dim:
        raise InputError(f"{store.folder}: expected vectors of {index.dim} dimensions, found {store.dim}")
    part = Part(store)
    source, sources = source_of(part), index.manifest.field("sources", list)
    if source in sources:
        if out is None or out.resolve() == folder.resolve():
            return 0
        raise InputError(f"{folder}: holds the passages of {store.folder} already")
    store.check(checked)
    if (found := duplicate_id([folder / IDS_FILE, *part.files("ids")])) is not None:
        raise InputError(f"{store.folder}: expected ids that are not yet in {folder}, found {found!r}")
    settings = Settings.of(index.faiss)
    prepare_to_add(index.faiss)
    try:
        add(index.faiss.add, part, progress)
    except RuntimeError as error:
        raise InputError(f"{folder}: cannot add {part.rows} vectors: {reason(error)}") from None
    settings.apply(index.faiss)
    with atomic_folder(out or folder) as new:
        ids, passages = [folder / IDS_FILE, *part.files("ids")], [folder / PASSAGES_FILE, *part.files("jsonl")]
        rows = index.rows + part.rows
        write_passages(ids, passages, rows, new)
        summed = write_faiss(index.faiss, new / FAISS_FILE)
        _carry_curve(index, new)
        finish(new, {**index.manifest.fields, "rows": rows, "sources": [*sources, source]}, summed)
    return part.rows


def delete_passages(
    folder: Path, ids: Sequence[str], out: Path | None = None, *, checked: Callable[[int], None] | None = None
) -> int:
    """Take the passages of `ids` out of the index in `folder`; returns how many were in it.

    Those left keep their order and close up, so that row n is still line n. Ids that are not in the index count for
    nothing: a run that was killed may be run again.

    Args:
        folder: the index.
        ids: of the passages to delete.
        out: folder of the new index; none replaces the old one.
        checked: called with the number of bytes each time some of the index were checked.

    Raises:
        InputError: its kind cannot delete, nothing would be left, or it is damaged.
    """
    index = _opened(folder, out, checked, "deleting", "build an index of the passages that are to stay")
    wanted = set(ids)
    keep = np.fromiter((id_ not in wanted for id_ in index.ids), bool, index.rows)
    deleted = int((~keep).sum())
    if deleted == index.rows:
        raise InputError(f"{folder}: expected passages to be left, found that all {deleted} would be deleted")
    if not deleted and (out is None or out.resolve() == folder.resolve()):
        return 0
    if deleted:
        _delete_rows(index.faiss, keep, folder)
    with atomic_folder(out or folder) as new:
        write_passages([folder / IDS_FILE], [folder / PASSAGES_FILE], index.rows, new, keep)
        summed = write_faiss(index.faiss, new / FAISS_FILE)
        _carry_curve(index, new)
        # Without a source's every passage the index no longer holds that source: adding it again must be possible.
        sources = [] if deleted else index.manifest.field("sources", list)
        finish(new, {**index.manifest.fields, "rows": index.rows - deleted, "sources": sources}, summed)
    return deleted


def retune(
    folder: Path,
    store: EmbeddingStore,
    target: Target,
    *,
    seed: int = 0,
    note: Callable[[str], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> Tuning:
    """Tune the index in `folder` to a recall target, measured against the vectors in `store`; it keeps its codes.

    Args:
        folder: the index.
        store: holds the vectors of all its passages, in the same order; those of passages that were deleted since, or
            that it never held, are passed over.
        target: the promise.
        seed: of the passages that are taken for queries where the target has none.
        note: called with a line each time a search setting was measured.
        checked: called with the number of bytes each time some of the index or the store were checked.

    Raises:
        InputError: `store` does not hold the passages of the index in their order, or is of another model or dimension;
            one of the two is damaged; or a graph would be measured by its own passages.
    """
    index = _opened(folder, None, checked)
    index.check_model(store.model)
    if store.dim != index.dim:
        raise InputError(f"{store.folder}: expected vectors of {index.dim} dimensions, found {store.dim}")
    if target.queries is None and is_graph(index.faiss):
        raise InputError(
            f"{folder}: expected --queries to measure a graph by, for a passage in it finds its own neighbours far "
            "more easily than a query does; `retriever index build --target-recall` holds passages out of it"
        )
    # The recall is measured against its vectors.
    store.check(checked)
    rows = _rows_in(store, index)
    without = np.delete(np.arange(store.rows), rows)
    held_out = rows[target.held_out_rows(index.rows, seed)]
    tuning = tune(index.faiss, find_truth(store, target, held_out, without), target, note)
    with atomic_folder(folder) as new:
        copy_rows(folder, new)
        if LISTS_FILE in index.manifest.files:
            (new / LISTS_FILE).hardlink_to(folder / LISTS_FILE)
        summed = write_faiss(index.faiss, new / FAISS_FILE)
        finish(new, {**index.manifest.fields, **tuned(tuning, new, index.factory, index.rows)}, summed)
    return tuning


def _opened(
    folder: Path,
    out: Path | None,
    checked: Callable[[int], None] | None,
    what: str | None = None,
    instead: str = "",
) -> Index:
    """The index, its every byte checked: the new one gets sums of its own, and they must not vouch for damage.

    For `what` its lists must be in memory; `instead` is what to do where they are on disk.
    """
    # A run that was killed while it exchanged the folders may have left none under the name, or the old one beside it.
    recover_folder(folder)
    if out is not None:
        check_replaceable(out)
    index = Index.open(folder, verify="hash", progress=checked)
    if what is not None and LISTS_FILE in index.manifest.files:
        raise InputError(
            f"{folder}: {what}: expected lists in memory, found lists on disk; {instead}, with --train-from {folder} "
            "and --on-disk"
        )
    return index


def _rows_in(store: EmbeddingStore, index: Index) -> np.ndarray:
    """The rows [N] int64 of `store` that hold the passages of `index`, which must come in the same order.

    Texts are compared with the ids: an id whose text has changed has another vector.
    """
    theirs = enumerate(_lines(store.files("jsonl")))
    rows = np.empty(index.rows, np.int64)
    for row, ours in enumerate(_lines([index.folder / PASSAGES_FILE])):
        rows[row] = next((place for place, line in theirs if line == ours), -1)
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


def _carry_curve(index: Index, new: Path) -> None:
    if CURVE_FILE in index.manifest.files:
        (new / CURVE_FILE).write_bytes((index.folder / CURVE_FILE).read_bytes())


def _delete_rows(index: Any, keep: np.ndarray, folder: Path) -> None:
    """Remove the rows that are not kept, of `keep` [N] bool, and number the others anew."""
    faiss = import_faiss()
    selector = faiss.IDSelectorBatch(np.flatnonzero(~keep))
    left = int(keep.sum())
    layers = list(parts(index))
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
    """Give every entry of the lists its row's `new` number; faiss closes up flat codes and leaves lists as they are."""
    faiss = import_faiss()
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            # A view of faiss's own memory: what is written here is what it finds.
            ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            ids[:] = new[ids]
