"""Script `ranking_loss_on_ranks.py`: the sentence-transformers losses under DDP, on two gloo processes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from forks import on_ranks
from ranking_loss_helpers import Tokens, padded, random_texts
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from losses import inf_cl_loss
from retriever.sentence_transformers import CachedInfCLRankingLoss, InfCLRankingLoss
from retriever.sentence_transformers.scale_checkpoint import LearnedScaleCallback

# Rows per column and number of columns of each rank.
ROWS = [3, 7]
WIDTHS = [3, 2]
SYMMETRIC: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def columns_of_ranks() -> list[list[list[list[int]]]]:
    """Return texts [ranks][columns][rows]. Few distinct tokens make many texts equal, within and across ranks."""
    return [random_texts(rows, WIDTHS[rank], seed=rank, tokens=3, longest=3) for rank, rows in enumerate(ROWS)]


def expected(symmetric: bool, masked: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute value and gradients of the whole batch in one process, with masks from comparing texts.

    The last gradient is that of the scale.
    """
    model, log_scale = Tokens(), torch.tensor(20.0).log().requires_grad_()
    shares = columns_of_ranks()
    queries = [text for share in shares for text in share[0]]
    positives = [text for share in shares for text in share[1]]
    passages = [text for share in shares for column in share[1:] for text in column]
    starts = itertools.accumulate([sum(map(len, share[1:])) for share in shares], initial=0)
    positive = [start + row for start, share in zip(starts, shares, strict=False) for row in range(len(share[0]))]
    pairs = [(query, text) for query, text in zip(queries, positives, strict=True)]
    excluded = [
        (i, j)
        for i, query in enumerate(queries)
        for j, text in enumerate(passages)
        if j != positive[i] and (query, text) in pairs
    ]
    assert len(excluded) > 3
    query, passage = (normalize(model(padded(texts))["sentence_embedding"], dim=1) for texts in (queries, passages))
    loss = inf_cl_loss(
        query, passage, logit_scale=log_scale.exp(), positive=torch.tensor(positive), symmetric=symmetric,
        excluded=torch.tensor(excluded) if masked else None,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), [*(parameter.grad for parameter in model.parameters()), log_scale.grad]  # type: ignore[misc]


def check() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    features = [padded(column) for column in columns_of_ranks()[rank]]
    for symmetric, masked in itertools.product((False, True), (False, True)):
        exchange = "ring" if symmetric == masked else "gather"
        value, wanted = expected(symmetric, masked)
        for kind, options in (
            (InfCLRankingLoss, {}),
            (CachedInfCLRankingLoss, {"mini_batch_size": 2}),
            (CachedInfCLRankingLoss, {"mini_batch_num_tokens": 5}),
        ):
            model = Tokens()
            # Ranks have different numbers of mini-batches, and DDP broadcasts buffers in forward.
            model.register_buffer("something", torch.zeros(3))
            ddp = DistributedDataParallel(model)
            averaged: list[int] = []

            def count(state, bucket, averaged=averaged):  # type: ignore[no-untyped-def] # DDP compares annotations
                averaged.append(bucket.index())
                return allreduce_hook(state, bucket)

            ddp.register_comm_hook(None, count)
            more: dict[str, Any] = options | (SYMMETRIC if symmetric else {})
            loss = kind(model, mask_duplicates=masked, exchange=exchange, **more)
            loss.model = ddp
            parameters = [*model.parameters(), loss.infonce.log_logit_scale]
            if kind is CachedInfCLRankingLoss:
                accumulate(loss, features, value, ddp, parameters, wanted)
                assert averaged == [0], averaged
            else:
                found = loss(features)
                torch.testing.assert_close(found.detach(), value)
                found.backward()
                torch.testing.assert_close([each.grad for each in parameters], wanted, rtol=1e-4, atol=1e-6)
    own_batches(rank, features)
    several_losses(rank, features)
    distributed.destroy_process_group()


def accumulate(
    loss: nn.Module, features: Any, value: Tensor, ddp: DistributedDataParallel, parameters: Any, wanted: list[Tensor]
) -> None:
    """Check that two accumulated steps are averaged once, at the end of the second."""
    for last in (False, True):
        found = loss(features)
        torch.testing.assert_close(found.detach(), value)
        if last:
            (found / 2).backward()
        else:
            with ddp.no_sync():
                (found / 2).backward()
    torch.testing.assert_close([each.grad for each in parameters], wanted, rtol=1e-4, atol=1e-6)


def own_batches(rank: int, features: Any) -> None:
    """Check that without a group each rank has its own loss, and the scale the same gradient on all ranks."""
    for kind in (InfCLRankingLoss, CachedInfCLRankingLoss):
        loss = kind(Tokens(), gather_across_devices=False)
        found = loss(features)
        found.backward()
        grads = [torch.zeros(()) for _ in range(distributed.get_world_size())]
        distributed.all_gather(grads, loss.infonce.log_logit_scale.grad)
        assert len({float(each) for each in grads}) == 1
        values = [torch.zeros(()) for _ in grads]
        distributed.all_gather(values, found.detach())
        assert len({float(each) for each in values}) == len(grads)


def several_losses(rank: int, features: Any) -> None:
    """Check that several learned scales in one step are refused on every rank, and several fixed scales are not."""
    for kind, learned in itertools.product((InfCLRankingLoss, CachedInfCLRankingLoss), (True, False)):
        losses = [
            kind(Tokens(), learn_scale=learned, mini_batch_size=2)
            if kind is CachedInfCLRankingLoss
            else kind(Tokens(), learn_scale=learned)
            for _ in range(2)
        ]
        optimizer = torch.optim.SGD([each.infonce.log_logit_scale for each in losses], lr=1.0)
        LearnedScaleCallback().on_train_begin(None, TrainerState(), None, optimizer=optimizer)
        losses[1](features)
        try:
            losses[min(rank, 1)](features)
        except ValueError as error:
            assert learned and "loss must be the same object for all datasets" in str(error)
        else:
            assert not learned


if __name__ == "__main__":
    on_ranks(len(ROWS), check)
