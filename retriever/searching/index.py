"""The public function `retriever.build_index`, which builds a FAISS index of an embedding store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from index.ann.build import Plan, build, choose_for
from index.ann.factory import explain, make, reason_of_choice
from index.ann.index import Index
from index.ann.layout import FAISS_FILE
from index.ann.on_disk import check_supported
from index.ann.tuning.recall import MIN_QUERIES, Target
from index.ann.tuning.result import Tuning
from index.files import InputError
from index.manifest import INDEX, read_manifest
from index.progress import Progress, Reporter, SilentReporter, as_reporter
from index.store.parts import Part
from index.store.prefix import truncated
from index.store.reader import EmbeddingStore
from retriever.errors import ArgumentError, check_at_least, check_numbers, check_paths, check_whole
from retriever.utils.check_progress import checksum_progress
from retriever.utils.torchrun import check_environment, world_size

if TYPE_CHECKING:
    # At run time they would import torch, which one process does not need.
    from retriever.distributed.ranks import Ranks
    from retriever.encoding.model import ModelInput


def build_index(
    store: EmbeddingStore | str | Path,
    out: str | Path,
    *,
    factory: str = "auto",
    target_recall: float | None = None,
    k: int = 10,
    queries: np.ndarray | Sequence[str] | None = None,
    model: ModelInput | None = None,
    held_out: int = 2000,
    memory_budget_mib: float | None = None,
    part: tuple[int, int] = (1, 1),
    train_from: str | Path | None = None,
    on_disk: bool = False,
    gpu: bool = False,
    seed: int = 0,
    dim: int | None = None,
    progress: Progress = None,
) -> Index:
    """Build a FAISS index of an embedding store.

    Under torchrun every process calls this function; they build the index together, in parts.

    Args:
        store: A store from `retriever.encode`, or its folder.
        out: Folder of the index.
        factory: A FAISS factory string, for example "Flat", "IVF1024,Flat", "HNSW32" or "OPQ32,IVF1024,PQ32x4fs".
            Default: "auto", chosen by the number of passages and the memory budget; the choice and its reason are
            reported.
        target_recall: Find the cheapest search settings that reach this recall@k. If no setting does, the best is kept
            and a warning is reported. Default: None, FAISS's settings.
        k: Passages per query of the target recall. Default: 10.
        queries: Queries to measure the recall with: [Q, D] float32 embeddings, or texts together with `model`. Default:
            None, passages held out of the training sample.
        model: The model that embeds `queries` if they are texts; the one that embedded the store.
        held_out: Number of passages to measure with if there are no queries. Default: 2000.
        memory_budget_mib: Maximum memory of the index in MiB; with `on_disk`, maximum memory while building. Default:
            None.
        part: (n, count): build only the n-th of `count` parts of the store, to be merged later. Default: (1, 1), all.
        train_from: Folder of an index whose training is reused, so that the two can be merged. Default: None.
        on_disk: Whether to leave the inverted lists on disk, for indexes larger than memory. Default: False.
        gpu: Whether to train and fill on all GPUs (needs a FAISS for GPUs). Default: False.
        seed: Seed of the training sample. Default: 0.
        dim: Index the first `dim` values of each embedding, at unit length, of a model trained with `loss.matryoshka`.
            Default: None, all that the store has.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The opened index.

    Raises:
        InputError: The store is damaged, the factory cannot be used with it, or `out` contains something else.
        ConfigError: An argument is invalid.
    """
    build_tuned_index(
        store,
        out,
        factory=factory,
        target_recall=target_recall,
        k=k,
        queries=queries,
        model=model,
        held_out=held_out,
        memory_budget_mib=memory_budget_mib,
        part=part,
        train_from=train_from,
        on_disk=on_disk,
        gpu=gpu,
        seed=seed,
        dim=dim,
        progress=progress,
    )
    return Index.open(out)


def build_tuned_index(
    store: EmbeddingStore | str | Path,
    out: str | Path,
    *,
    factory: str,
    target_recall: float | None,
    k: int,
    queries: np.ndarray | Sequence[str] | None,
    model: ModelInput | None,
    held_out: int,
    memory_budget_mib: float | None,
    part: tuple[int, int],
    train_from: str | Path | None,
    on_disk: bool,
    gpu: bool,
    seed: int,
    dim: int | None,
    progress: Progress,
) -> tuple[EmbeddingStore, str, int, Tuning | None]:
    """`build_index`, but return the store, the factory string, the number of rows, and what tuning found (if asked)."""
    check_paths(out=out)
    if not isinstance(store, EmbeddingStore):
        check_paths(store=store)
    if train_from is not None:
        check_paths(train_from=train_from)
    if not isinstance(factory, str):
        raise ArgumentError("factory", f"expected a FAISS factory string, found {factory!r:.60}")
    if not isinstance(part, tuple) or len(part) != 2:
        raise ArgumentError("part", f"expected two numbers, as in (2, 8), found {part!r:.60}")
    if memory_budget_mib is not None:
        check_numbers(memory_budget_mib=memory_budget_mib)
    if target_recall is not None:
        check_numbers(target_recall=target_recall)
    if queries is not None and not isinstance(queries, np.ndarray):
        if isinstance(queries, str | bytes) or not isinstance(queries, Iterable):
            raise ArgumentError("queries", f"expected vectors or texts, found {type(queries).__name__}")
        queries = list(queries)
    if not 1 <= part[0] <= part[1]:
        raise ArgumentError("part", f"expected a part and their number, as in 2/8, found '{part[0]}/{part[1]}'")
    if memory_budget_mib is not None and not memory_budget_mib > 0:
        raise ArgumentError("memory_budget_mib", f"expected more than 0, found {memory_budget_mib}")
    check_whole(seed=seed)
    if not 0 <= seed < 2**31:
        raise ArgumentError("seed", f"expected a number from 0 to {2**31 - 1}, found {seed}")
    if dim is not None:
        check_at_least(1, dim=dim)
    check_target(target_recall, k, queries, model, held_out)
    if target_recall is None and queries is not None:
        raise ArgumentError("queries", "expected target_recall with them")
    if train_from is not None and factory != "auto":
        raise ArgumentError("factory", "leave it out with train_from, which gives the factory")
    given = {
        "factory": factory,
        "target_recall": target_recall,
        "k": k,
        "queries": queries is not None,
        "held_out": held_out,
        "memory_budget_mib": memory_budget_mib,
        "part": list(part),
        "train_from": train_from is not None,
        "on_disk": on_disk,
        "gpu": gpu,
        "seed": seed,
        "dim": dim,
    }

    def build_with(ranks: Ranks | None) -> tuple[EmbeddingStore, str, int, Tuning | None]:
        is_first = ranks is None or ranks.is_first
        reporter = as_reporter(progress) if is_first else SilentReporter()
        opened = truncated(store if isinstance(store, EmbeddingStore) else EmbeddingStore.open(store), dim)
        rows = Part(opened, *part).rows
        trained = None if train_from is None else Path(train_from)
        chosen, reason = _chosen_factory(opened, factory, memory_budget_mib, trained, on_disk)
        # An index on disk may be larger than memory.
        reporter.line(explain(chosen, rows, opened.dim, None if on_disk else memory_budget_mib) + reason)
        target = None
        if target_recall is not None and is_first:
            target = Target(target_recall, k, query_vectors(opened, queries, model, reporter), held_out)
        plan = Plan(chosen, seed, memory_budget_mib, target, part, trained, on_disk, gpu)
        return opened, chosen, rows, _build(opened, Path(out), plan, rows, reporter, ranks)

    check_environment()
    if world_size() == 1:
        return build_with(None)
    from retriever.distributed.context import joined_ranks, same_settings

    if part != (1, 1):
        raise ArgumentError("part", "leave it out under torchrun, whose processes build the parts by themselves")
    if gpu:
        raise ArgumentError("gpu", "leave it out under torchrun; one process trains and fills on all GPUs")
    with joined_ranks(same_settings("index build", "cpu", given)) as ranks:
        return build_with(ranks)


def check_target(
    recall: float | None,
    k: int,
    queries: np.ndarray | Sequence[str] | None,
    model: ModelInput | None,
    held_out: int,
) -> None:
    """Check the arguments of a recall target.

    Raises:
        ConfigError: An argument is invalid.
    """
    check_at_least(1, k=k)
    check_at_least(MIN_QUERIES, held_out=held_out)
    if recall is not None and not 0 < recall <= 1:
        raise ArgumentError("target_recall", f"expected more than 0 and at most 1, found {recall}")
    if (queries is None or isinstance(queries, np.ndarray)) != (model is None):
        raise ArgumentError("queries", "expected texts together with the model that embedded the passages")


def query_vectors(
    store: EmbeddingStore, queries: np.ndarray | Sequence[str] | None, model: ModelInput | None, reporter: Reporter
) -> np.ndarray | None:
    """[Q, D] float32 embeddings of the queries of a recall target; None without queries.

    Raises:
        InputError: The model is not the one that embedded the store.
    """
    if queries is None or isinstance(queries, np.ndarray):
        return queries
    from retriever.encoding.model import as_model

    assert model is not None
    # The model of a truncated store has the same dimensions, whether they were cut when encoding or now.
    dim = store.model.get("dim")
    loaded = as_model(model, reporter, dim=None if dim is None else int(dim))
    if (found := loaded.towers.fingerprint()) != store.model:
        raise InputError(f"{loaded.name}: expected the model of {store.folder} ({store.model}), found {found}")
    return loaded.encode_queries(list(queries), progress=reporter)


def _chosen_factory(
    store: EmbeddingStore, factory: str, memory_budget_mib: float | None, train_from: Path | None, on_disk: bool
) -> tuple[str, str]:
    """The factory string, and the reason if it was chosen automatically."""
    if train_from is None and factory == "auto":
        chosen = choose_for(store, memory_budget_mib, on_disk=on_disk)
        return chosen, f"; chosen for {reason_of_choice(chosen, store.rows, store.dim, on_disk=on_disk)}"
    if train_from is not None:
        # Its bytes are checked before they are used.
        factory = Index(read_manifest(train_from, INDEX)).factory
    if on_disk:
        check_supported(make(factory, store.dim), f"factory {factory!r} on disk")
    return factory, ""


def _build(
    store: EmbeddingStore, out: Path, plan: Plan, rows: int, reporter: Reporter, ranks: Ranks | None
) -> Tuning | None:
    with (
        checksum_progress(reporter, [plan.train_from] if plan.train_from else [], [FAISS_FILE]) as checked,
        reporter.bar(f"index {plan.factory}", rows if ranks is None else None, "vectors") as advance,
    ):

        def note(text: str) -> None:
            if text.startswith("factory "):
                # About the result, not about what is being done.
                reporter.line(text)
            else:
                advance(0, text)

        if ranks is None:
            tuning = build(store, out, plan, progress=advance, note=note, checked=checked)
        else:
            from retriever.distributed.index_build import build_on_ranks

            tuning = build_on_ranks(ranks, store, out, plan, progress=advance, note=note)
    if tuning is not None:
        reporter.line(tuning.line())
    return tuning
