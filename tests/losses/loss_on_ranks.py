"""One rank of several: the loss over a gloo group compared with one process. Run by test_loss_on_ranks.py."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from option_cases import FEATURES, assert_same_statistics, case, run
from torch import Tensor, distributed, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from losses import (
    Guide,
    InfCLLoss,
    Positives,
    disco_clip_loss,
    gathered_clip_loss,
    inf_cl_loss,
    local_rows_loss,
    ring_clip_loss,
    sigmoid_loss,
)

DIMENSIONS = 13


def whole_batch(queries: int, passages: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(rows, DIMENSIONS, dtype=torch.float64, generator=generator) for rows in (queries, passages))
    query, passage = (normalize(side, dim=1) for side in sides)
    return query, passage


def own(rows: Tensor | None, counts: list[int], rank: int) -> Tensor | None:
    return None if rows is None else rows.split(counts)[rank]


def some_pairs(queries: int, passages: int, positive: Tensor) -> Tensor:
    """Random pairs to exclude; no query with its own positive."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.randint(size, (2 * queries,), generator=generator) for size in (queries, passages))
    return torch.stack([rows, columns], 1)[columns != positive[rows]]


def own_pairs(pairs: Tensor, counts: list[int], rank: int) -> Tensor:
    """Pairs of this rank's queries, with rows counted from its first query."""
    first = sum(counts[:rank])
    mine = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + counts[rank])]
    return mine - torch.tensor([first, 0])


def value_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [each.double() for each in (loss.detach(), *torch.autograd.grad(0.7 * loss, leaves))]


def errors(
    group: Any,
    counts: list[int],
    more: list[int],
    dtype: torch.dtype,
    *,
    random_positive: bool,
    ids: bool,
    **options: Any,
) -> list[float]:
    """Relative errors of value and averaged gradients (query, passage, logit_scale) against float64 in one process."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    passages = [queries + extra for queries, extra in zip(counts, more, strict=True)]
    query, passage = (side.to(dtype) for side in whole_batch(sum(counts), sum(passages)))
    firsts = [0, *itertools.accumulate(passages)]
    positive = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=False)])
    if random_positive:
        positive = torch.randperm(sum(passages), generator=torch.Generator().manual_seed(1))[: sum(counts)]
    passage_ids = torch.arange(sum(passages)) % 11 if ids else None
    # Covers excluded pairs with and without ids, and with and without symmetric.
    excluded = some_pairs(sum(counts), sum(passages), positive) if ids == options["symmetric"] else None
    logit_scale = options.pop("logit_scale")
    leaves = [*(side.double().requires_grad_() for side in (query, passage)), torch.tensor(logit_scale).double()]
    leaves[2].requires_grad_()
    truth = inf_cl_loss(
        leaves[0], leaves[1], logit_scale=leaves[2], positive=positive, passage_ids=passage_ids, excluded=excluded,
        symmetric=options["symmetric"], implementation="full",
    )  # fmt: skip
    expected = value_and_gradients(truth, *leaves)

    shard = [query.split(counts)[rank].requires_grad_(), passage.split(passages)[rank].requires_grad_()]
    scale = torch.tensor(logit_scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    loss = inf_cl_loss(
        shard[0], shard[1], logit_scale=scale, group=group,
        positive=own(positive, counts, rank) if random_positive else None,
        passage_ids=own(passage_ids, passages, rank),
        excluded=None if excluded is None else own_pairs(excluded, counts, rank), **options,
    )  # fmt: skip
    values = [torch.empty_like(loss) for _ in range(size)]
    distributed.all_gather(values, loss.detach(), group=group)
    assert all(torch.equal(value, loss) for value in values), "the value differs between ranks"
    value, *found = value_and_gradients(loss, *shard, scale)
    distributed.all_reduce(found[2], group=group)
    mine = [value, found[0] / size, found[1] / size, found[2] / size]
    theirs = [expected[0], expected[1].split(counts)[rank], expected[2].split(passages)[rank], expected[3]]
    whole = [expected[0], expected[1], expected[2], expected[3]]
    return [float((a - b).norm() / c.norm()) for a, b, c in zip(mine, theirs, whole, strict=True)]


SHARDS = {
    1: ([7], [2]),
    2: ([5, 9], [3, 0]),
    3: ([7, 0, 11], [0, 0, 4]),
    4: ([6, 1, 0, 8], [2, 0, 5, 0]),
}
ALLOWED = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-3}


def check_values(size: int) -> None:
    counts, more = SHARDS[size]
    for dtype, exchange, symmetric, ids, random_positive, logit_scale in itertools.product(
        (torch.float64, torch.float32), ("ring", "gather"), (False, True), (False, True), (False, True), (20.0, 500.0)
    ):
        options: dict[str, Any] = {"symmetric": symmetric, "exchange": exchange, "logit_scale": logit_scale}
        found = errors(
            distributed.group.WORLD,
            counts,
            more,
            dtype,
            random_positive=random_positive,
            ids=ids,
            workspace_mib=2**-8,
            **options,
        )
        assert max(found) <= ALLOWED[dtype], (dtype, options, ids, random_positive, found)


def check_narrow_embeddings(size: int) -> None:
    counts, more = SHARDS[size]
    for exchange in ("ring", "gather"):
        found = errors(
            distributed.group.WORLD, counts, more, torch.bfloat16, random_positive=True, ids=True, symmetric=True,
            exchange=exchange, logit_scale=20.0,
        )  # fmt: skip
        assert max(found) <= ALLOWED[torch.bfloat16], (exchange, found)


def check_options(size: int, features: Iterable[str], dtypes: Iterable[torch.dtype], **more: Any) -> None:
    """Loss, averaged gradients and statistics with `positives`, `negatives` and `statistics`."""
    counts, extra = SHARDS[size]
    rank, passages = distributed.get_rank(), [a + b for a, b in zip(counts, extra, strict=True)]
    first_query, first_passage = sum(counts[:rank]), sum(passages[:rank])
    firsts = [0, *itertools.accumulate(passages)]
    diagonal = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=False)])
    mine = slice(first_query, first_query + counts[rank]), slice(first_passage, first_passage + passages[rank])
    for feature, symmetric, random_positive, scale in itertools.product(
        features, (False, True), (False, True), (20.0, 500.0)
    ):
        masks = symmetric == random_positive
        given = case(feature, sum(counts), sum(passages), random_positive=True, excluded=masks, ids=masks)
        if not random_positive:
            given["positive"] = diagonal
            if given.get("excluded") is not None:
                pairs = given["excluded"]
                given["excluded"] = pairs[pairs[:, 1] != diagonal[pairs[:, 0]]]
        given["symmetric"] = symmetric
        truth, of_truth = run(given | {"implementation": "full"}, scale, torch.float64)
        shard = dict(given)
        for name, span in (("query", mine[0]), ("passage", mine[1]), ("positive", mine[0]), ("passage_ids", mine[1])):
            shard[name] = None if given.get(name) is None else given[name][span]
        if not random_positive:
            shard["positive"] = None
        if given.get("excluded") is not None:
            shard["excluded"] = own_pairs(given["excluded"], counts, rank)
        if "positives" in given:
            shard["positives"] = Positives(
                own_pairs(given["positives"].pairs, counts, rank), given["positives"].reduction
            )
        if "negatives" in given and given["negatives"].guide is not None:
            guide = given["negatives"].guide
            guide = Guide(guide.query[mine[0]], guide.passage[mine[1]], guide.margin)
            shard["negatives"] = replace(given["negatives"], guide=guide)
        for exchange, dtype in itertools.product(("ring", "gather"), dtypes):
            options = {"group": distributed.group.WORLD, "exchange": exchange, "workspace_mib": 2**-8, **more}
            (value, query, passage, of_scale), statistics = run(shard | options, scale, dtype)
            distributed.all_reduce(of_scale)
            found = [value, query / size, passage / size, of_scale / size]
            theirs = [truth[0], truth[1][mine[0]], truth[2][mine[1]], truth[3]]
            allowed = {torch.float64: 1e-11, torch.float32: 1e-5}[dtype] * (1 if scale == 20 else 100)
            for ours, expected, whole in zip(found, theirs, truth, strict=True):
                error = float((ours - expected).norm())
                assert error <= allowed * float(whole.norm()) + 1e-9, (feature, symmetric, exchange, dtype, scale)
            rows = ("rank", "hardest", "hardest_score", "entropy", "masked")
            of_rows = replace(of_truth, **{name: getattr(of_truth, name)[mine[0]] for name in rows})
            assert_same_statistics(statistics, of_rows, max(allowed, 1e-9))


def check_literature(size: int) -> None:
    counts, rank = SHARDS[size][0], distributed.get_rank()
    for dtype in (torch.float64, torch.float32):
        query, passage = (side.to(dtype) for side in whole_batch(sum(counts), sum(counts)))
        wide = [side.double().requires_grad_() for side in (query, passage)]
        wide.append(torch.tensor(20.0, dtype=torch.float64, requires_grad=True))
        truth = inf_cl_loss(*wide[:2], logit_scale=wide[2], symmetric=True, implementation="full")
        expected = value_and_gradients(truth, *wide)
        for loss_of in (gathered_clip_loss, local_rows_loss, disco_clip_loss, ring_clip_loss):
            shard = [side.split(counts)[rank].clone().requires_grad_() for side in (query, passage)]
            scale = torch.tensor(20.0, dtype=dtype, requires_grad=True)
            loss = loss_of(*shard, logit_scale=scale, group=distributed.group.WORLD)
            value, *found = value_and_gradients(loss, *shard, scale)
            distributed.all_reduce(found[2])
            theirs = [expected[0], *(side.split(counts)[rank] for side in expected[1:3]), expected[3]]
            for ours, true, whole in zip([value, *(each / size for each in found)], theirs, expected, strict=True):
                assert float((ours - true).norm() / whole.norm()) <= ALLOWED[dtype], (loss_of.__name__, dtype)


def check_sigmoid(size: int) -> None:
    counts, more = SHARDS[size]
    rank, passages = distributed.get_rank(), [a + b for a, b in zip(counts, more, strict=True)]
    allowed = ALLOWED | {torch.bfloat16: 8e-3}
    for dtype, implementation in itertools.product(ALLOWED, ("chunked", "triton")):
        if implementation == "triton" and dtype != torch.float32:
            continue
        query, passage = (side.to(dtype) for side in whole_batch(sum(counts), sum(passages)))
        ids = torch.arange(sum(passages)) % 11
        wide = [side.double().requires_grad_() for side in (query, passage)]
        wide += [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (10.0, -4.0)]
        firsts = [0, *itertools.accumulate(passages)]
        positive = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=False)])
        truth = sigmoid_loss(
            *wide[:2], logit_scale=wide[2], logit_bias=wide[3], positive=positive, passage_ids=ids,
            excluded=(excluded := some_pairs(sum(counts), sum(passages), positive)), implementation="full",
        )  # fmt: skip
        expected = value_and_gradients(truth, *wide)
        shard = [side.split(sizes)[rank].clone() for side, sizes in ((query, counts), (passage, passages))]
        shard += [number.detach().to(torch.promote_types(dtype, torch.float32)) for number in wide[2:]]
        leaves = [leaf.requires_grad_() for leaf in shard]
        loss = sigmoid_loss(
            *leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], passage_ids=own(ids, passages, rank),
            excluded=own_pairs(excluded, counts, rank), group=distributed.group.WORLD, implementation=implementation,
            workspace_mib=2**-6,
        )  # fmt: skip
        value, *found = value_and_gradients(loss, *leaves)
        for number in found[2:]:
            distributed.all_reduce(number)
        theirs = [expected[0], expected[1].split(counts)[rank], expected[2].split(passages)[rank], *expected[3:]]
        for ours, true, whole in zip([value, *(each / size for each in found)], theirs, expected, strict=True):
            assert float((ours - true).norm() / whole.norm()) <= allowed[dtype], (dtype, implementation)


def check_kernels(size: int) -> None:
    counts, more = SHARDS[size]
    for exchange, symmetric, random_positive, logit_scale in itertools.product(
        ("ring", "gather"), (False, True), (False, True), (20.0, 500.0)
    ):
        options: dict[str, Any] = {"exchange": exchange, "symmetric": symmetric, "logit_scale": logit_scale}
        found = errors(
            distributed.group.WORLD, counts, more, torch.float32, random_positive=random_positive,
            ids=symmetric != random_positive, implementation="triton", **options,
        )  # fmt: skip
        assert max(found) <= ALLOWED[torch.float32], (options, random_positive, found)


def check_two_groups(size: int) -> None:
    pairs = [[0, 2], [1, 3]]
    groups = [distributed.new_group(pair) for pair in pairs]
    mine = groups[distributed.get_rank() % 2]
    for exchange in ("ring", "gather"):
        counts = [3, 4] if distributed.get_rank() % 2 else [9, 1]
        found = errors(
            mine, counts, [1, 0], torch.float64, random_positive=False, ids=False, symmetric=True, exchange=exchange,
            logit_scale=20.0,
        )  # fmt: skip
        assert max(found) <= ALLOWED[torch.float64], found


def check_errors_on_all_ranks(size: int) -> None:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    query, passage = whole_batch(4, 4)

    def refused(message: str, **arguments: Any) -> None:
        given = {"query": query, "passage": passage, "logit_scale": 3.0} | arguments
        try:
            inf_cl_loss(given.pop("query"), given.pop("passage"), group=group, **given)
        except ValueError as error:
            assert message in str(error), (message, str(error))
        else:
            raise AssertionError(f"not refused: {message}")

    last = rank == size - 1
    refused("query must be", query=query[0] if last else query)
    refused("query must be a tensor, found str", query="no tensor" if last else query)
    refused("workspace_mib", workspace_mib=-1 if last else 1)
    refused("implementation", implementation="full" if last else "auto")
    refused(f"positive must index the pool's {4 * size}", positive=torch.full((4,), 4 * size) if last else None)
    refused("excluded must have shape", excluded=torch.zeros(3).long() if last else None)
    for pair in ([4, 0], [0, 4 * size]):
        wrong = torch.tensor([[0, 1 if rank else 2], pair])
        refused(f"4 queries and {4 * size} passages, found {pair}", excluded=wrong if last else None)
    own_positive = torch.tensor([[1, 4 * rank + 1]])
    refused(f"own positive, found [1, {4 * size - 3}]", excluded=own_positive if last else own_positive[:0])
    pairs = torch.tensor([[0, 4 * size]])
    refused("positives.pairs must hold rows of 4", positives=Positives(pairs if last else pairs[:0]))
    refused("options differs", statistics=last)
    refused("negatives must be a Negatives", negatives=0.95 if last else None)
    refused("symmetric differs", symmetric=last)
    refused("logit_scale differs", logit_scale=2.0 if last else 3.0)
    refused("requires_grad differs", query=query.clone().requires_grad_(last))
    refused("query is empty on all ranks", query=query[:0])
    refused("passage_ids differs", passage_ids=torch.arange(4) if last else None)
    # The group still works afterwards.
    inf_cl_loss(query, passage, logit_scale=3.0, group=group)


def check_kernels_with_options(size: int) -> None:
    check_options(size, ("all mean",), (torch.float32,), implementation="triton", precision="fp32")


class LiteratureLoss(InfCLLoss):
    """A loss from the literature with a learnable scale."""

    def __init__(self, loss_of: Any) -> None:
        super().__init__(logit_scale=10.0)
        self.loss_of = loss_of

    def forward(self, query: Tensor, passage: Tensor, **_: Any) -> Tensor:
        return self.loss_of(query, passage, logit_scale=self.logit_scale, group=self.group)


class Pair(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.tower = nn.Linear(DIMENSIONS, 7, bias=False)
        with torch.no_grad():
            self.tower.weight.copy_(torch.randn(7, DIMENSIONS, generator=generator))
        self.criterion = criterion

    def forward(self, query: Tensor, passage: Tensor, **more: Tensor | None) -> Tensor:
        return self.criterion(normalize(self.tower(query), dim=1), normalize(self.tower(passage), dim=1), **more)


def check_parameters_under_ddp(size: int) -> None:
    """Several optimizer steps of every loss, for towers and scale, compared with those of one process."""
    counts, more = SHARDS[size]
    for exchange, symmetric, negatives in itertools.product(("ring", "gather"), (True, False), (False, True)):
        settings: dict[str, Any] = {"logit_scale": 10.0, "symmetric": symmetric, "exchange": exchange}
        compare_parameters(InfCLLoss(**settings), InfCLLoss(**settings), counts, more if negatives else [0] * size)
    for loss_of in (gathered_clip_loss, local_rows_loss, disco_clip_loss, ring_clip_loss):
        compare_parameters(InfCLLoss(logit_scale=10.0, symmetric=True), LiteratureLoss(loss_of), counts, [0] * size)


def compare_parameters(of_one: InfCLLoss, of_ranks: InfCLLoss, counts: list[int], more: list[int]) -> None:
    """`more` hard negatives per rank; if there are any, equal ids are masked too."""
    rank, passages = distributed.get_rank(), [a + b for a, b in zip(counts, more, strict=True)]
    firsts = [0, *itertools.accumulate(passages)]
    positive = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=False)])
    ids = torch.arange(sum(passages)) % 11 if any(more) else None
    of_ranks.group = distributed.group.WORLD
    alone, pair = Pair(of_one), Pair(of_ranks)
    together = DistributedDataParallel(pair)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (alone, pair)]
    for step in range(4):
        query, passage = (side.float() for side in whole_batch(sum(counts), sum(passages), step))
        passage = passage.clone()
        passage[positive] = query + 0.3 * passage[positive]
        whole = alone(query, passage, positive=positive, passage_ids=ids)
        own_ids = own(ids, passages, rank)
        share = together(query.split(counts)[rank], passage.split(passages)[rank], passage_ids=own_ids)
        for loss, optimizer in zip((whole, share), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for (name, a), b in zip(alone.named_parameters(), pair.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=2e-6, atol=2e-6), (of_ranks, name, step, (a - b).abs().max())


def main(size: int) -> None:
    distributed.init_process_group("gloo")
    check_values(size)
    check_narrow_embeddings(size)
    if size == 3:
        check_options(size, FEATURES, (torch.float64,))
        check_options(size, ("all mean",), (torch.float32,))
    if size == 4:
        check_options(size, ("none", "all sum"), (torch.float64,))
    check_literature(size)
    check_sigmoid(size)
    check_errors_on_all_ranks(size)
    check_parameters_under_ddp(size)
    if size == 3:
        check_kernels(size)
        check_kernels_with_options(size)
    if size == 4:
        check_two_groups(size)
    distributed.barrier()
    # gloo ends its threads with the last reference to the group; DDP holds one in a reference cycle.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main(int(sys.argv[1]))
