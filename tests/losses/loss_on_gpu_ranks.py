"""One rank of several on GPUs: the kernels' loss over ranks against float64. Run by test_loss_on_gpus.py.

With one GPU per rank, tensors are sent by NCCL; ranks that share a GPU send them through the host, by gloo.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from option_cases import assert_same_statistics, case, run
from torch import Tensor, distributed
from torch.nn.functional import normalize

from losses import inf_cl_loss
from losses.distributed.communication import GroupCommunication

DIMENSIONS = 200
SHARDS = {
    1: ([300], [77]),
    2: ([300, 571], [0, 129]),
    3: ([257, 0, 401], [0, 0, 130]),
    4: ([257, 1, 0, 401], [2, 0, 131, 0]),
}
ALLOWED = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2}


class HostCommunication(GroupCommunication):
    """Sends GPU tensors through the host, for ranks that share a GPU."""

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        arrived = [tensor.cpu() for tensor in incoming]
        wait_here = super().start_exchange([tensor.cpu() for tensor in outgoing], arrived, step)

        def wait() -> None:
            wait_here()
            for tensor, host in zip(incoming, arrived, strict=True):
                tensor.copy_(host)

        return wait

    def reduce_max(self, tensor: Tensor) -> None:
        super().reduce_max(host := tensor.cpu())
        tensor.copy_(host)

    def reduce_sum(self, tensor: Tensor) -> None:
        super().reduce_sum(host := tensor.cpu())
        tensor.copy_(host)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return super().gather_rows(rows.cpu(), counts).to(rows.device)

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return super().scatter_sums(rows.cpu(), counts).to(rows.device)


def relative_errors(
    group: Any, size: int, dtype: torch.dtype, random_positive: bool, ids: bool, **options: Any
) -> list[float]:
    """Relative errors of the value and of the averaged gradients of this rank's embeddings and of logit_scale."""
    rank, (counts, more) = distributed.get_rank(), SHARDS[size]
    passages = [queries + extra for queries, extra in zip(counts, more, strict=True)]
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(rows, DIMENSIONS, generator=generator) for rows in (sum(counts), sum(passages)))
    query, passage = (normalize(side, dim=1).to(dtype) for side in sides)
    firsts = [0, *itertools.accumulate(passages)]
    positive = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=False)])
    if random_positive:
        positive = torch.randperm(sum(passages), generator=generator)[: sum(counts)]
    passage_ids = torch.arange(sum(passages)) % 97 if ids else None
    excluded = None
    if random_positive:
        rows, columns = (torch.randint(size, (500,), generator=generator) for size in (sum(counts), sum(passages)))
        excluded = torch.stack([rows, columns], 1)[columns != positive[rows]]
    logit_scale = options.pop("logit_scale")

    wide = [each.double().requires_grad_() for each in (query, passage, torch.tensor(logit_scale))]
    truth = inf_cl_loss(
        *wide[:2], logit_scale=wide[2], positive=positive, passage_ids=passage_ids, implementation="full",
        symmetric=options["symmetric"], excluded=excluded,
    )  # fmt: skip
    expected = [truth.detach(), *torch.autograd.grad(truth, wide)]

    leaves = [query.split(counts)[rank], passage.split(passages)[rank], torch.tensor(logit_scale)]
    leaves = [leaf.cuda().requires_grad_() for leaf in leaves]
    if excluded is not None:
        first = sum(counts[:rank])
        mine = (excluded[:, 0] >= first) & (excluded[:, 0] < first + counts[rank])
        excluded = (excluded[mine] - torch.tensor([first, 0])).cuda()
    loss = inf_cl_loss(
        *leaves[:2], logit_scale=leaves[2], group=group, excluded=excluded,
        positive=positive.split(counts)[rank].cuda() if random_positive else None,
        passage_ids=None if passage_ids is None else passage_ids.split(passages)[rank].cuda(), **options,
    )  # fmt: skip
    query_gradient, passage_gradient, scale = (g.double().cpu() / size for g in torch.autograd.grad(loss, leaves))
    distributed.all_reduce(scale)
    found = [loss.detach().double().cpu(), query_gradient, passage_gradient, scale]
    own = [expected[0], expected[1].split(counts)[rank], expected[2].split(passages)[rank], expected[3]]
    return [float((a - b).norm() / c.norm()) for a, b, c in zip(found, own, expected, strict=True)]


def check_options(group: Any, size: int, feature: str, exchange: str, symmetric: bool) -> None:
    """Value, averaged gradients and statistics with `positives`, `negatives` and `statistics`, in float32."""
    rank, (counts, more) = distributed.get_rank(), SHARDS[size]
    passages = [queries + extra for queries, extra in zip(counts, more, strict=True)]
    mine = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (counts, passages)]
    given = case(feature, sum(counts), sum(passages), random_positive=True, excluded=True, ids=True, dims=DIMENSIONS)
    given["symmetric"] = symmetric
    truth, of_truth = run(given | {"implementation": "full"}, 20.0, torch.float64)

    def own_pairs(pairs: Tensor) -> Tensor:
        inside = (pairs[:, 0] >= mine[0].start) & (pairs[:, 0] < mine[0].stop)
        return pairs[inside] - torch.tensor([mine[0].start, 0])

    shard = dict(given)
    for name, span in (("query", 0), ("passage", 1), ("positive", 0), ("passage_ids", 1)):
        shard[name] = given[name][mine[span]]
    shard["excluded"] = own_pairs(given["excluded"])
    if "positives" in given:
        shard["positives"] = replace(given["positives"], pairs=own_pairs(given["positives"].pairs))
    if "negatives" in given:
        guide = given["negatives"].guide
        guide = replace(guide, query=guide.query[mine[0]], passage=guide.passage[mine[1]])
        shard["negatives"] = replace(given["negatives"], guide=guide)
    options = {"group": group, "exchange": exchange, "implementation": "triton", "workspace_mib": 1}
    (value, query, passage, scale), statistics = run(shard | options, 20.0, torch.float32, "cuda")
    distributed.all_reduce(scale)
    found = [value, query / size, passage / size, scale / size]
    own = [truth[0], truth[1][mine[0]], truth[2][mine[1]], truth[3]]
    for ours, expected, whole in zip(found, own, truth, strict=True):
        assert float((ours - expected).norm()) <= 5e-5 * float(whole.norm()), (feature, exchange, symmetric)
    rows = ("rank", "hardest", "hardest_score", "entropy", "masked")
    of_rows = replace(of_truth, **{name: getattr(of_truth, name)[mine[0]] for name in rows})
    assert_same_statistics(statistics, of_rows, 1e-4)


def main(size: int) -> None:
    own_gpus = torch.cuda.device_count() >= size
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if own_gpus else 0)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo")
    group: Any = distributed.group.WORLD if own_gpus else HostCommunication(distributed.group.WORLD)
    for dtype, exchange, symmetric, ids, random_positive, logit_scale in itertools.product(
        ALLOWED, ("ring", "gather"), (False, True), (False, True), (False, True), (20.0, 300.0)
    ):
        if dtype != torch.bfloat16 and not (symmetric and ids == random_positive):
            # Each combination compiles new kernels, which takes most of the time.
            continue
        settings: dict[str, Any] = {"exchange": exchange, "symmetric": symmetric, "logit_scale": logit_scale}
        found = relative_errors(
            group, size, dtype, random_positive, ids, implementation="triton", workspace_mib=1, **settings
        )
        # The rounding error of a score grows with the scale.
        allowed = ALLOWED[dtype] * max(1, logit_scale / 60)
        assert max(found) <= allowed, (dtype, settings, ids, random_positive, found)
    for feature, exchange, symmetric in itertools.product(
        ("none", "all mean", "all sum"), ("ring", "gather"), (False, True)
    ):
        check_options(group, size, feature, exchange, symmetric)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
