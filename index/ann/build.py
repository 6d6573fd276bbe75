"""Building a FAISS index of an embedding store, or of a part of it, in the memory of the index and one shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from index.ann import factory as factories
from index.ann import gpu
from index.ann import on_disk as lists_on_disk
from index.ann.factory import import_faiss, reason
from index.ann.index import Index
from index.ann.layout import CURVE_FILE, FAISS_FILE, LISTS_FILE, check_replaceable, finish, write_faiss, write_passages
from index.ann.settings import flat_codes, prepare_to_add, set_search_defaults
from index.ann.train import fingerprint, sample_vectors, train, trained_part
from index.ann.tuning import curve
from index.ann.tuning.graphs import add_held_out, is_graph, takes_rows_later, truth_without
from index.ann.tuning.recall import Target, find_truth
from index.ann.tuning.tune import Tuning, tune
from index.background import Beside
from index.files import InputError, atomic_folder
from index.manifest import INDEX, read_manifest
from index.store.parts import Part
from index.store.reader import EmbeddingStore

# Vectors whose lengths are looked at.
NORMS = 4096


@dataclass(frozen=True)
class Plan:
    """How an index is built; what is left out is what most want."""

    factory: str = "Flat"
    """A faiss factory string, or "auto" to choose by size and memory."""
    seed: int = 0
    """Of the training sample and of k-means, 0 to 2**31 - 1."""
    memory_mib: float | None = None
    """Most that "auto" may take for the index, and that `on_disk` may hold at once."""
    target: Target | None = None
    """A recall to reach at the least cost."""
    part: tuple[int, int] = (1, 1)
    """Which part of the store, from 1, and of how many."""
    train_from: Path | None = None
    """An index whose training is taken over, so that the two can be merged."""
    on_disk: bool = False
    """Leave the inverted lists in a file of their own."""
    gpu: bool = False
    """Train and fill on the GPUs that faiss finds."""


def build(
    store: EmbeddingStore,
    out: Path,
    plan: Plan | None = None,
    *,
    factory: str | None = None,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
    checked: Callable[[int], None] | None = None,
) -> Tuning | None:
    """Index the passages of `store` by inner product into the folder `out`, which is replaced when it is an index.

    Holds the index, the training vectors before it is filled, and one piece of a shard in memory. Training vectors are
    drawn at random from all rows, 39 to 256 a centroid. Every byte of the store is checked, beside the other work: the
    index gets sums of its own, and they must not vouch for damage.

    Args:
        store: what to index.
        out: folder of the index.
        plan: how.
        factory, seed: short for a plan of these alone.
        progress: called with the number of rows each time some were added.
        note: called with a line before the index is trained, and each time a search setting was measured.
        checked: called with the number of bytes each time some of the index `plan.train_from` were checked.

    Returns:
        What tuning found, where the plan has a target.

    Raises:
        InputError: the store is empty or damaged, `seed` is out of range, `factory` is wrong, needs more training
            vectors than there are or more memory than allowed, `out` holds something that is no index, or faiss is
            missing.
        OSError: the disk is full.
    """
    plan = plan or Plan(factory or "Flat", seed or 0)
    if not 0 <= plan.seed < 2**31:
        raise InputError(f"seed: expected a number from 0 to {2**31 - 1}, found {plan.seed}")
    check_replaceable(out)
    if plan.gpu:
        gpu.check_gpus()
    part = Part(store, *plan.part)
    if plan.target is not None and part.count > 1:
        raise InputError("--target-recall: expected a whole index; merge the parts, then `retriever index tune`")
    held_out = plan.target.held_out_rows(store.rows, plan.seed) if plan.target else np.empty(0, np.int64)
    with atomic_folder(out) as folder, Beside() as beside:
        if note is not None:
            note("training")
        index, origin = _trained(part, plan, held_out, beside, checked, note)
        # In a graph, those it is measured by must not be yet.
        added_last = held_out if is_graph(index) else held_out[:0]
        if len(added_last) and not takes_rows_later(index):
            raise InputError(
                f"factory {origin['factory']!r}: expected --queries to measure it by, for rows cannot come in later"
            )
        beside.begin(write_passages, part.files("ids"), part.files("jsonl"), part.rows, folder)

        def added(rows: int) -> None:
            # What is found to be damaged is not added to for hours.
            beside.look()
            if progress is not None:
                progress(rows)

        prepare_to_add(index)
        try:
            put = gpu.adder(index) if plan.gpu else index.add
            if plan.on_disk:
                lists_on_disk.fill(index, part, folder, out, plan.memory_mib, put, added)
            elif plan.gpu and gpu.makes_graph(index):
                index = gpu.graph(index, part.pieces(added_last), part.rows - len(added_last), added)
            else:
                if not part.in_one_piece:
                    reserve(index, part.rows)
                add(put, part, added, without=added_last)
        except RuntimeError as error:
            raise _cannot(origin["factory"], part.rows, error) from None
        # Nothing is measured beside other work.
        beside.wait()
        set_search_defaults(index)
        tuning = None
        if plan.target is not None:
            find = truth_without if len(added_last) else find_truth
            tuning = tune(index, find(store, plan.target, held_out), plan.target, note)
        if len(added_last):
            add_held_out(index, store, added_last)
            added(len(added_last))
        summed = write_faiss(index, folder / FAISS_FILE)
        fields = {
            **origin,
            "metric": "inner_product",
            "rows": part.rows,
            "dim": store.dim,
            "model": store.model,
            "source": store.source,
            "sources": [source_of(part)],
        }
        finish(folder, {**fields, **tuned(tuning, folder, origin["factory"], part.rows)}, summed)
    return tuning


def choose_for(store: EmbeddingStore, memory_mib: float | None, *, on_disk: bool = False) -> str:
    """What `factory.choose` takes for the vectors of `store`, of which some thousand are looked at.

    Raises:
        InputError: as `factory.choose`.
    """
    sample = sample_vectors(store, min(store.rows, NORMS), 0)
    even = factories.has_even_norms(sample)
    return factories.choose(store.rows, store.dim, memory_mib, even_norms=even, on_disk=on_disk)


def reserve(index: Any, rows: int) -> None:
    """Take the memory of flat codes at once: growing by doubling holds up to three times as much."""
    faiss = import_faiss()
    for each in flat_codes(index):
        if isinstance(each, faiss.IndexFlatCodes) and hasattr(each.codes, "owned_data") and not each.ntotal:
            each.codes.resize(rows * each.code_size)
            each.codes.clear()


def add(
    put: Callable[[np.ndarray], None],
    part: Part,
    progress: Callable[[int], None] | None,
    *,
    without: np.ndarray | None = None,
) -> None:
    """Give `put` the vectors [n, D] float32 of `part`, in order, but those of the store's rows `without`."""
    for vectors in part.pieces(without):
        put(vectors)
        if progress is not None:
            progress(len(vectors))


def source_of(part: Part) -> dict[str, Any]:
    """What identifies the passages of `part`: the sums of its files of ids and vectors, and how many there are."""
    files = part.store.manifest.files
    sums = [files[path.name].sha256 for path in (*part.files("ids"), *part.files("npy"))]
    return {"rows": part.rows, "sha256": hashlib.sha256("\n".join(sums).encode()).hexdigest()}


def tuned(tuning: Tuning | None, folder: Path, factory: str, rows: int) -> dict[str, Any]:
    """The manifest's field of what was measured, beside its plot; nothing where nothing was."""
    if tuning is None:
        return {}
    size = sum(path.stat().st_size for path in (folder / FAISS_FILE, folder / LISTS_FILE) if path.exists())
    curve.draw(tuning, f"{factory}, {rows:,} passages, {size / 2**20:,.1f} MiB", folder / CURVE_FILE)
    return {"tuning": {**tuning.as_json(), "rows": rows, "index_bytes": size}}


def _trained(
    part: Part,
    plan: Plan,
    held_out: np.ndarray,
    beside: Beside,
    checked: Callable[[int], None] | None,
    note: Callable[[str], None] | None,
) -> tuple[Any, dict[str, Any]]:
    """An empty trained index, and the manifest's fields that say how it came to be."""
    store = part.store
    if plan.train_from is not None:
        trained = Index(read_manifest(plan.train_from, INDEX))
        if trained.dim != store.dim:
            raise InputError(f"{plan.train_from}: expected {store.dim} dimensions, found {trained.dim}")
        trained.check_model(store.model)
        trained.check(checked, [FAISS_FILE])
        part.check_beside(beside)
        index = trained_part(trained)
        origin = {name: trained.manifest.fields.get(name) for name in ("factory", "seed", "trained_on", "trained")}
        return index, origin
    factory = plan.factory if plan.factory != "auto" else choose_for(store, plan.memory_mib, on_disk=plan.on_disk)
    index = factories.make(factory, store.dim)
    # Trained on the whole store, the whole of it is read; a part of it otherwise.
    (part if index.is_trained else Part(store)).check_beside(beside)
    try:
        trained_on = train(index, store, factory, plan.seed, without=held_out, gpu=plan.gpu, note=note)
    except RuntimeError as error:
        raise _cannot(factory, part.rows, error) from None
    set_search_defaults(index)
    return index, {"factory": factory, "seed": plan.seed, "trained_on": trained_on, "trained": fingerprint(index)}


def _cannot(factory: str, rows: int, error: Exception) -> InputError:
    return InputError(f"factory {factory!r}: cannot index {rows} vectors: {reason(error)}")
