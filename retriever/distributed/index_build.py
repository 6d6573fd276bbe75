"""Build an index with several ranks: each rank fills parts of it, and rank 0 merges them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from index.ann.build import Plan, build
from index.ann.edit import retune
from index.ann.factory import import_faiss, make
from index.ann.layout import check_replaceable
from index.ann.merge import merge
from index.ann.settings import core
from index.ann.tuning.result import Tuning
from index.files import InputError
from index.manifest import INDEX, read_manifest
from index.store.reader import EmbeddingStore
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks

# Rank 0 trains and fills one part while the others wait. Smaller parts shorten the wait.
PARTS_PER_RANK = 4


def build_on_ranks(
    ranks: Ranks,
    store: EmbeddingStore,
    out: Path,
    plan: Plan,
    *,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Tuning | None:
    """Build an index with all ranks.

    The index is bitwise equal to that of `index.ann.build.build` in one process. The ranks fill parts in folders next
    to `out`, all with the training of the first part, and rank 0 merges them and measures the target as `retune` does.
    The folders of a killed build are replaced by the next one.

    Args:
        ranks: the ranks; each calls this function with the same arguments.
        store: the embeddings.
        out: folder of the index, on a file system that all ranks share.
        plan: what to build. Only rank 0 needs `plan.target`.
        progress: called with the number of vectors just added by this rank.
        note: called with messages for the user.

    Returns:
        The tuning on rank 0 if the plan has a target, otherwise None.

    Raises:
        InputError: as `build`; or the store has a single shard, or indexes of this kind cannot be merged.
        RanksDifferError: embeddings, plan or folder differ between ranks.
    """
    embeddings = {"model": store.model, "source": store.source, "files": store.manifest.files}
    settings = {"factory": plan.factory, "seed": plan.seed, "memory": plan.memory_mib, "on disk": plan.on_disk}
    check_same_on_ranks(
        ranks,
        {"embeddings": ContentHash.of(embeddings, str(store.folder)), **settings, "trained from": _trained_from(plan)},
    )
    check_same_folder(ranks, "out", out)
    # `core` returns a view into this index, which must stay alive.
    empty = make(plan.factory, store.dim)
    faiss = import_faiss()
    if not isinstance(core(empty), faiss.IndexIVF | faiss.IndexFlatCodes | faiss.IndexFastScan):
        raise InputError(
            f"factory {plan.factory!r}: expected Flat, SQ…, PQ… or IVF…, whose parts can be merged, to be built by "
            "several processes; start it without torchrun"
        )
    count = min(PARTS_PER_RANK * ranks.world_size, len(store.files("npy")))
    if count < 2:
        raise InputError(
            f"{store.folder}: expected at least two shards for several processes, found {count}; start it "
            "without torchrun"
        )
    check_replaceable(out)
    out = out.resolve()
    parts = [out.with_name(f"{out.name}.part-{number}") for number in range(1, count + 1)]

    def fill(number: int, train_from: Path | None) -> None:
        part = replace(plan, part=(number, count), train_from=train_from, target=None)
        build(store, parts[number - 1], part, progress=progress)

    if ranks.is_first:
        fill(1, plan.train_from)
    ranks.barrier()
    for number in range(ranks.rank + 1, count + 1, ranks.world_size):
        if number > 1:
            fill(number, parts[0])
    ranks.barrier()
    tuning = None
    if ranks.is_first:
        merge(parts, out, on_disk=plan.on_disk)
        for part in parts:
            shutil.rmtree(part)
        if plan.target is not None:
            tuning = retune(out, store, plan.target, seed=plan.seed, note=note)
    ranks.barrier()
    return tuning


def _trained_from(plan: Plan) -> ContentHash | None:
    """The training of the index that `plan` copies it from, or None."""
    if plan.train_from is None:
        return None
    return ContentHash.of(read_manifest(plan.train_from, INDEX).fields.get("trained"), str(plan.train_from))
