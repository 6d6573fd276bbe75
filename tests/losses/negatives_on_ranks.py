"""One rank of several: the loss with negatives outside the pool, over gloo. Run by test_negatives_on_ranks.py."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from negatives_batch import SOURCES, Batch, step
from torch import Tensor, distributed

from losses import NegativeLimit, Negatives, Ragged, inf_cl_loss

# Queries of each rank, and further passages.
SHARDS = {1: ([7], [2]), 2: ([5, 9], [3, 0]), 3: ([7, 0, 11], [0, 2, 4]), 4: ([6, 1, 0, 8], [2, 0, 5, 0])}


def of_rank(batch: Batch, counts: list[int], passages: list[int], rank: int) -> Batch:
    """This rank's shard. Positives and excluded passages are rows of the pool; frozen passages are the same."""
    first = sum(counts[:rank])
    queries = slice(first, first + counts[rank])
    offsets = batch.offsets[queries.start : queries.stop + 1]

    def mine(pairs: Tensor) -> Tensor:
        inside = (pairs[:, 0] >= queries.start) & (pairs[:, 0] < queries.stop)
        return pairs[inside] - torch.tensor([first, 0])

    return replace(
        batch,
        query=batch.query[queries],
        passage=batch.passage.split(passages)[rank],
        own=batch.own[offsets[0] : offsets[-1]],
        offsets=offsets - offsets[0],
        frozen_excluded=mine(batch.frozen_excluded),
        positive=None if batch.positive is None else batch.positive[queries],
        passage_ids=None if batch.passage_ids is None else batch.passage_ids.split(passages)[rank],
        excluded=None if batch.excluded is None else mine(batch.excluded),
    )


def errors(
    sources: tuple[str, ...], dtype: torch.dtype, logit_scale: float, masks: bool, random_positive: bool, **options: Any
) -> list[float]:
    """Relative errors of value and averaged gradients against float64 in one process."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    counts, more = SHARDS[size]
    passages = [queries + extra for queries, extra in zip(counts, more, strict=True)]
    batch = Batch.random(sum(counts), sum(passages), masks=masks, random_positive=random_positive).rounded(dtype)
    if not random_positive:
        # Each rank's positives are its own passages in order.
        firsts = [sum(passages[:number]) for number in range(size)]
        own = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=True)])
        whole = replace(batch, positive=own)
    else:
        whole = batch
    if batch.excluded is not None and whole.positive is not None:
        pairs = batch.excluded[batch.excluded[:, 1] != whole.positive[batch.excluded[:, 0]]]
        batch, whole = replace(batch, excluded=pairs), replace(whole, excluded=pairs)
    shared = {name: options[name] for name in ("symmetric", "limit") if name in options}
    truth = step(whole, sources, logit_scale, **shared, implementation="full")
    group = distributed.group.WORLD
    value, *found = step(of_rank(batch, counts, passages, rank), sources, logit_scale, dtype, group=group, **options)
    values = [torch.empty_like(value) for _ in range(size)]
    distributed.all_gather(values, value)
    assert all(torch.equal(each, value) for each in values), "the value differs between ranks"
    distributed.all_reduce(found[2])
    starts = [0, *itertools.accumulate(counts)]
    mine = [truth[0], truth[1].split(counts)[rank], truth[2].split(passages)[rank], truth[3]]
    if "own" in sources:
        mine.append(truth[4][batch.offsets[starts[rank]] : batch.offsets[starts[rank + 1]]])
    return [
        # Gradients of easy own negatives underflow in float32.
        float((a - b).norm() / c.norm().clamp(min=1e-6))
        for a, b, c in zip([value, *(each / size for each in found)], mine, truth, strict=True)
    ]


def check_values() -> None:
    for exchange, symmetric, masks, random_positive, logit_scale in itertools.product(
        ("ring", "gather"), (False, True), (False, True), (False, True), (20.0, 500.0)
    ):
        sources: tuple[str, ...]
        for sources in (("own",), ("frozen",), ("same_side",), SOURCES):
            case: dict[str, Any] = {"exchange": exchange, "symmetric": symmetric, "workspace_mib": 2**-8}
            found = errors(sources, torch.float64, logit_scale, masks, random_positive, **case)
            assert max(found) <= 1e-11, (sources, case, masks, random_positive, logit_scale, found)
        found = errors(SOURCES, torch.float32, logit_scale, masks, random_positive, **case)
        assert max(found) <= (1e-5 if logit_scale == 20 else 2e-4), (case, masks, random_positive, logit_scale, found)


def check_values_with_a_limit() -> None:
    for exchange, symmetric, masks, random_positive in itertools.product(
        ("ring", "gather"), (False, True), (False, True), (False, True)
    ):
        case: dict[str, Any] = {"exchange": exchange, "symmetric": symmetric, "limit": NegativeLimit(margin=0.05)}
        found = errors(("own", "frozen"), torch.float64, 20.0, masks, random_positive, **case)
        assert max(found) <= 1e-11, (case, masks, random_positive, found)


def check_narrow_embeddings() -> None:
    for exchange in ("ring", "gather"):
        found = errors(SOURCES, torch.bfloat16, 20.0, True, False, exchange=exchange, symmetric=True)
        assert max(found) <= 4e-3, (exchange, found)


def check_kernels() -> None:
    for exchange, logit_scale in (("ring", 20.0), ("gather", 500.0)):
        case: dict[str, Any] = {"exchange": exchange, "symmetric": True, "implementation": "triton"}
        found = errors(SOURCES, torch.float32, logit_scale, exchange == "gather", exchange == "gather", **case)
        assert max(found) <= (1e-5 if logit_scale == 20 else 2e-4), (case, found)


def check_errors_on_all_ranks() -> None:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    batch = Batch.random(4, 4, masks=False, random_positive=False)
    own = Ragged(batch.own, batch.offsets)
    last = rank == size - 1

    def refused(message: str, negatives: Negatives | None) -> None:
        try:
            inf_cl_loss(batch.query, batch.passage, logit_scale=3.0, group=distributed.group.WORLD, negatives=negatives)
        except ValueError as error:
            assert message in str(error), (message, str(error))
        else:
            raise AssertionError(f"not refused: {message}")

    refused("negatives.own.offsets must begin with 0", Negatives(own=Ragged(own.values, own.offsets + last)))
    if size > 1:
        refused("negatives differs", Negatives(own=own) if last else None)
        refused("negatives differs", Negatives(frozen=batch.frozen[: 40 + last]))
        refused("negatives differs", Negatives(same_side=last))
    # The group still works afterwards.
    inf_cl_loss(batch.query, batch.passage, logit_scale=3.0, group=distributed.group.WORLD)


def main(size: int) -> None:
    distributed.init_process_group("gloo")
    check_errors_on_all_ranks()
    check_values()
    check_values_with_a_limit()
    check_narrow_embeddings()
    if size == 3:
        check_kernels()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main(int(sys.argv[1]))
