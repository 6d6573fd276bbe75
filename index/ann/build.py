"""Building a FAISS index of an embedding store or a part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from index.ann import factory as factories
from index.ann import on_disk as lists_on_disk
from index.ann.factory import CAGRA, import_faiss, is_cagra, reason
from index.ann.gpu import build as gpu
from index.ann.gpu.support import check_gpus
from index.ann.index import Index
from index.ann.layout import CURVE_FILE, FAISS_FILE, LISTS_FILE, check_replaceable, finish, write_faiss, write_passages
from index.ann.settings import Settings, flat_codes, set_add_effort, set_search_defaults
from index.ann.train import empty_trained_index, fingerprint, sample_vectors, train
from index.ann.tuning import curve
from index.ann.tuning.graphs import add_held_out, can_add_later, is_graph, truth_for_held_out
from index.ann.tuning.measure import measured_on_gpu
from index.ann.tuning.recall import Target, find_truth
from index.ann.tuning.result import Tuning
from index.ann.tuning.tune import tune
from index.background import BackgroundTasks
from index.files import ArgumentError, InputError, atomic_folder
from index.files.disk_space import check_free_space
from index.manifest import INDEX, read_manifest
from index.store.parts import Part
from index.store.reader import EmbeddingStore

# Vectors sampled to compare norms.
NORMS = 4096


@dataclass(frozen=True)
class Plan:
    """Build options; the defaults suit most users."""

    factory: str = "Flat"
    """A faiss factory string, or "auto" to choose one by size and memory."""
    seed: int = 0
    """Seed of the training sample and of k-means, 0 to 2**31 - 1."""
    memory_mib: float | None = None
    """Memory budget in MiB: limits the size of an "auto" index, and what `on_disk` holds at once."""
    target: Target | None = None
    """Recall target that tuning must reach."""
    part: tuple[int, int] = (1, 1)
    """(number, count): which part of the store to index, from 1, and of how many."""
    train_from: Path | None = None
    """Folder of an index whose training is reused, so that the two can be merged."""
    on_disk: bool = False
    """Store the inverted lists in a file of their own."""
    gpu: bool = False
    """Train and assign vectors to lists on all GPUs that faiss finds, and measure recall on them."""


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
    """Build a FAISS index of `store` by inner product in the folder `out`.

    Training vectors are drawn at random from all rows, 64 per centroid (at least 16,384) where there are as many.
    Every byte of the store is verified in background threads during the build, because the new index gets checksums
    of its own. Memory: the index, the training vectors (before the index is filled) and one piece of a shard.

    Args:
        store: the passages to index.
        out: folder of the index; an existing index is replaced.
        plan: build options; None: the defaults.
        factory: without a plan, its factory string; default "Flat".
        seed: without a plan, its seed; default 0.
        progress: called with the number of rows just added.
        note: called with a line of text before training and after each measured search setting.
        checked: called with the number of bytes of the index `plan.train_from` just checked.

    Returns:
        The result of tuning if `plan.target` is set, else None.

    Raises:
        InputError: the store is empty or damaged; `seed` is out of range; the factory string is invalid, needs more
            training vectors than there are or more memory than allowed; `out` contains something other than an index;
            or faiss is not installed.
        OSError: the disk is full.
    """
    plan = plan or Plan(factory or "Flat", seed or 0)
    if not 0 <= plan.seed < 2**31:
        raise InputError(f"seed: expected a number from 0 to {2**31 - 1}, found {plan.seed}")
    check_replaceable(out)
    if plan.gpu:
        check_gpus()
    if CAGRA.fullmatch(plan.factory):
        gpu.check_cagra(plan.factory)
    part = Part(store, *plan.part)
    if plan.target is not None and part.count > 1:
        raise ArgumentError("target_recall", "expected a whole index; merge the parts, then `retriever index tune`")
    held_out = plan.target.held_out_rows(store.rows, plan.seed) if plan.target else np.empty(0, np.int64)
    with atomic_folder(out) as folder, BackgroundTasks() as background:
        if note is not None:
            note("training")
        index, origin = _trained_index(part, plan, held_out, background, checked, note)
        _check_space(out, part, origin["factory"], on_disk=plan.on_disk)
        # A graph must not contain the passages it is measured with: they are added after tuning.
        added_last = held_out if is_graph(index) else held_out[:0]
        rebuilt = is_cagra(index)
        if len(added_last) and not rebuilt and not can_add_later(index):
            raise InputError(
                f"factory {origin['factory']!r}: expected queries to measure its recall with, because "
                "held-out passages could not be added to it afterwards"
            )
        background.submit(write_passages, part.files("ids"), part.files("jsonl"), part.rows, folder)

        def added(rows: int) -> None:
            # Stop early if a background check has found damage.
            background.raise_failures()
            if progress is not None:
                progress(rows)

        set_add_effort(index)
        try:
            put = gpu.add_function(index) if plan.gpu else index.add
            if plan.on_disk:
                lists_on_disk.fill(index, part, folder, out, plan.memory_mib, put, added)
            elif rebuilt or (plan.gpu and gpu.can_build_graph(index)):
                index = gpu.build_graph(index, part.pieces(added_last), part.rows - len(added_last), added)
            else:
                if not part.in_one_piece:
                    reserve(index, part.rows)
                add(put, part, added, without=added_last)
        except RuntimeError as error:
            raise _build_error(origin["factory"], part.rows, error) from None
        # Background work would disturb the measurements.
        background.wait()
        set_search_defaults(index)
        tuning = None
        if plan.target is not None:
            find = truth_for_held_out if len(added_last) else find_truth
            on_gpu = measured_on_gpu(index, plan.target, note) if plan.gpu or rebuilt else None
            tuning = tune(index, find(store, plan.target, held_out), plan.target, note, on_gpu)
        if len(added_last) and rebuilt:
            # Nothing can be added to such a graph.
            settings = Settings.of(index)
            index = gpu.build_graph(index, part.pieces(), part.rows, lambda rows: None)
            settings.apply(index)
        elif len(added_last):
            add_held_out(index, store, added_last)
        if len(added_last):
            added(len(added_last))
        sha256 = write_faiss(index, folder / FAISS_FILE)
        fields = {
            **origin,
            "metric": "inner_product",
            "rows": part.rows,
            "dim": store.dim,
            "model": store.model,
            "source": store.source,
            "sources": [source_of(part)],
        }
        finish(folder, {**fields, **tuning_fields(tuning, folder, origin["factory"], part.rows)}, sha256)
    return tuning


def choose_for(store: EmbeddingStore, memory_mib: float | None, *, on_disk: bool = False) -> str:
    """The result of `factory.choose` for `store`; a sample of its vectors shows whether norms vary.

    Raises:
        InputError: no index fits `memory_mib`.
    """
    sample = sample_vectors(store, min(store.rows, NORMS), 0)
    even = factories.has_even_norms(sample)
    return factories.choose(store.rows, store.dim, memory_mib, even_norms=even, on_disk=on_disk)


def reserve(index: Any, rows: int) -> None:
    """Reserve the memory of flat codes: growing by doubling takes up to three times as much."""
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
    """Pass the vectors of `part` to `put` in pieces [n, D] float32, except the rows `without` of the store."""
    for vectors in part.pieces(without):
        put(vectors)
        if progress is not None:
            progress(len(vectors))


def source_of(part: Part) -> dict[str, Any]:
    """Identify the passages of `part` in a manifest: row count, and a hash of its files' checksums."""
    files = part.store.manifest.files
    sums = [files[path.name].sha256 for kind in ("ids", "npy", "jsonl") for path in part.files(kind)]
    return {"rows": part.rows, "sha256": hashlib.sha256("\n".join(sums).encode()).hexdigest()}


def tuning_fields(tuning: Tuning | None, folder: Path, factory: str, rows: int) -> dict[str, Any]:
    """The "tuning" field of the manifest; also draws the curve. Empty if nothing was tuned."""
    if tuning is None:
        return {}
    size = sum(path.stat().st_size for path in (folder / FAISS_FILE, folder / LISTS_FILE) if path.exists())
    curve.draw(tuning, f"{factory}, {rows:,} passages, {size / 2**20:,.1f} MiB", folder / CURVE_FILE)
    return {"tuning": {**tuning.as_json(), "rows": rows, "index_bytes": size}}


def _trained_index(
    part: Part,
    plan: Plan,
    held_out: np.ndarray,
    background: BackgroundTasks,
    checked: Callable[[int], None] | None,
    note: Callable[[str], None] | None,
) -> tuple[Any, dict[str, Any]]:
    """An empty trained index, and the manifest fields that describe its training."""
    store = part.store
    if plan.train_from is not None:
        trained = Index(read_manifest(plan.train_from, INDEX))
        if trained.dim != store.dim:
            raise InputError(f"{plan.train_from}: expected {store.dim} dimensions, found {trained.dim}")
        trained.check_model(store.model)
        trained.check(checked, [FAISS_FILE])
        part.check_in_background(background)
        index = empty_trained_index(trained)
        origin = {name: trained.manifest.fields.get(name) for name in ("factory", "seed", "trained_on", "trained")}
        return index, origin
    factory = plan.factory if plan.factory != "auto" else choose_for(store, plan.memory_mib, on_disk=plan.on_disk)
    index = factories.make(factory, store.dim)
    # Training reads the whole store; without training only the part is read.
    (part if index.is_trained else Part(store)).check_in_background(background)
    try:
        trained_on = train(index, store, factory, plan.seed, without=held_out, gpu=plan.gpu, note=note)
    except RuntimeError as error:
        raise _build_error(factory, part.rows, error) from None
    set_search_defaults(index)
    return index, {"factory": factory, "seed": plan.seed, "trained_on": trained_on, "trained": fingerprint(index)}


def _check_space(out: Path, part: Part, factory: str, *, on_disk: bool) -> None:
    """Check that the index fits on the disk of `out`. With lists on disk, they are written in groups and then merged.

    Raises:
        InputError: it does not.
    """
    try:
        each = factories.bytes_per_vector(factory, part.store.dim)
    except InputError:
        # Some factories have no fixed size per vector.
        return
    texts = sum(path.stat().st_size for kind in ("ids", "jsonl") for path in part.files(kind))
    check_free_space(out, part.rows * each * (2 if on_disk else 1) + texts, f"an index of {part.rows:,} passages")


def _build_error(factory: str, rows: int, error: Exception) -> InputError:
    return InputError(f"factory {factory!r}: cannot index {rows} vectors: {reason(error)}")
