"""An index that the processes of a torchrun build together: in parts, which the first of them merges."""

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
from index.ann.tuning.tune import Tuning
from index.files import InputError
from index.manifest import INDEX, read_manifest
from index.store.reader import EmbeddingStore
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks
from retriever.distributed.ranks import Ranks

# Parts a process. The others wait while the first trains and fills one of its own: the more parts, the shorter.
PARTS = 4


def build_on_ranks(
    ranks: Ranks,
    store: EmbeddingStore,
    out: Path,
    plan: Plan,
    *,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Tuning | None:
    """`build` by all ranks together: they fill parts beside `out`, trained alike, and the first rank merges them.

    Every rank calls it with the same arguments, but for the target, which the first alone needs. `out` lies on a disk
    that all of them see. The index has the bytes that one process would write; its target is measured afterwards, as
    `retune` does. Merging holds what `merge` holds. A killed run leaves its parts; the next replaces them.

    Raises:
        InputError: as `build`; the store has one shard alone, or indexes of the kind cannot be merged.
        RanksDifferError: the ranks have other embeddings, plans or folders.
    """
    what = {"model": store.model, "source": store.source, "files": store.manifest.files}
    how = {"factory": plan.factory, "seed": plan.seed, "memory": plan.memory_mib, "on disk": plan.on_disk}
    check_same_on_ranks(
        ranks, {"embeddings": ContentHash.of(what, str(store.folder)), **how, "trained from": _trained_from(plan)}
    )
    check_same_folder(ranks, "out", out)
    # Named, so that it lives while its core is looked at.
    whole = make(plan.factory, store.dim)
    faiss = import_faiss()
    if not isinstance(core(whole), faiss.IndexIVF | faiss.IndexFlatCodes | faiss.IndexFastScan):
        raise InputError(
            f"factory {plan.factory!r}: expected Flat, SQ…, PQ… or IVF…, whose parts can be merged, to be built by "
            "several processes; start it without torchrun"
        )
    count = min(PARTS * ranks.world_size, len(store.files("npy")))
    if count < 2:
        raise InputError(
            f"{store.folder}: expected two shards or more for several processes to build from, found {count}; start it "
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
    """The index whose training is taken over."""
    if plan.train_from is None:
        return None
    return ContentHash.of(read_manifest(plan.train_from, INDEX).fields.get("trained"), str(plan.train_from))
