"""The further terms of a batch's row sums, from all sources of `negatives` that are outside the pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.api import DistributedBatch
from losses.distributed.blocks import BlockBackend, PassageBlock
from losses.distributed.communication import Communication
from losses.distributed.torch_blocks import TorchBackend
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.negatives.frozen import FrozenTerm, frozen_term
from losses.negatives.inputs import FurtherNegatives, with_nan_for_invalid_negatives
from losses.negatives.own import own_term
from losses.negatives.same_side import Side, SideRanks, same_side_term
from losses.precision import Precision, matmul_precision


def with_further_terms(
    batch: ContrastiveBatch,
    negatives: FurtherNegatives,
    precision: Precision,
    workspace_bytes: int,
    fused: bool,
    ranks: tuple[Communication, Shards, Literal["ring", "gather"]] | None = None,
) -> ContrastiveBatch:
    """Add the log-sum-exps of all sources to `batch.further`, differentiable with respect to their inputs.

    Args:
        fused: Whether Triton kernels compute.
        ranks: The communication, the shards and the exchange of a batch over ranks, or None for one process.
    """
    batch, negatives = with_nan_for_invalid_negatives(batch, negatives)
    terms, query = [], batch.query
    if query.dtype == torch.bfloat16 and negatives.sources() > 1:
        # The sources' gradients are summed in float32 and rounded once.
        query = query.float()
    own, scale, of_query = negatives.own, batch.logit_scale, query
    if batch.options is not None and batch.options.hardness:
        # Terms weighted by exp(β c) have the exponents (logit_scale + β) c; β has no part in their gradients.
        scale = batch.logit_scale + batch.options.hardness
        share = (batch.logit_scale / scale).detach()
        of_query = _ScaledGradient.apply(query, share)
        if own is not None:
            own = replace(own, values=_ScaledGradient.apply(own.values, share))
    if own is not None:
        terms.append(own_term(of_query, own, scale, precision, workspace_bytes, fused))
    bounds = None
    if negatives.same_side or (negatives.frozen is not None and fused):
        bounds = _bounds_of_pool(batch, precision, workspace_bytes, fused, ranks)
    if negatives.frozen is not None:
        options = (bounds if fused else None, precision, workspace_bytes)
        term = FrozenTerm(negatives.frozen, negatives.frozen_excluded, *options)
        terms.append(frozen_term(of_query, scale, term))
    if negatives.same_side:
        assert bounds is not None
        terms += _same_side_terms(batch, query, bounds, precision, workspace_bytes, fused, ranks)
    return replace(batch, further=torch.stack(terms), single_partition=negatives.same_side and batch.symmetric)


class _ScaledGradient(torch.autograd.Function):
    """The same embeddings, whose gradient is multiplied by a 0-dim factor."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (upstream * factor).to(upstream.dtype), None


def with_terms_over_ranks(sharded: DistributedBatch, negatives: FurtherNegatives) -> DistributedBatch:
    """`with_further_terms` of this rank's shard."""
    ranks = (sharded.communication, sharded.shards, sharded.exchange)
    options = (sharded.precision, sharded.workspace_bytes, sharded.fused)
    return replace(sharded, batch=with_further_terms(sharded.batch, negatives, *options, ranks))


@torch.no_grad()
def _bounds_of_pool(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, fused: bool, ranks: Any
) -> Tensor:
    """[4], bounds of the scores of all ranks, in the form of the backend."""
    shards = None if ranks is None else ranks[1]
    first = 0 if shards is None else shards.first_passage
    backend_class = TritonBackend if fused else TorchBackend
    backend: BlockBackend = backend_class(batch, precision, workspace_bytes, first)
    own = PassageBlock(backend.prepare_passages(batch.passage), batch.passage_ids, first)
    with matmul_precision(precision, batch.query.device):
        bounds = backend.score_bounds(own, positives_local=shards is None or not shards.positive_given)
        if ranks is not None:
            ranks[0].reduce_max(bounds)
        backend.set_bounds(bounds)
    return bounds


def _same_side_terms(
    batch: ContrastiveBatch,
    query: Tensor,
    bounds: Tensor,
    precision: Precision,
    workspace_bytes: int,
    fused: bool,
    ranks: Any,
) -> list[Tensor]:
    """[M] each: the terms of the queries; if symmetric, also those of their positives among the passages.

    `query` are the queries of the batch, in float32 if its gradients of several sources are summed.
    """
    bounds = bounds.clone()
    # Scores within a side are bounded by the longer side.
    bounds[:2] = bounds[:2].max()
    communication, shards = (None, None) if ranks is None else ranks[:2]
    options = (bounds, precision, workspace_bytes, fused)

    def side_of(counts: tuple[int, ...] | None, ids: Tensor | None, count: int, needed: int) -> Side:
        of_ranks, first = None, 0
        if communication is not None and counts is not None:
            of_ranks = SideRanks(communication, Shards(communication.rank, counts, counts, True), ranks[2])
            first = of_ranks.shards.first_passage
        if ids is None:
            ids = torch.arange(first, first + count, dtype=torch.int32, device=batch.query.device)
        elif fused and of_ranks is None:
            from losses.triton.launch import compact_ids

            ids = compact_ids(ids, ids)[0]
        return Side(ids, needed, *options, of_ranks)

    queries, passages = len(batch.query), len(batch.passage)
    of_queries = side_of(None if shards is None else shards.queries, batch.query_ids, queries, queries)
    terms = [same_side_term(query, batch.logit_scale, of_queries)]
    if not batch.symmetric:
        return terms
    in_order = batch.diagonal and (shards is None or not shards.positive_given)
    needed = queries if in_order else passages
    of_passages = side_of(None if shards is None else shards.passages, batch.passage_ids, passages, needed)
    found = same_side_term(batch.passage, batch.logit_scale, of_passages)
    if in_order:
        terms.append(found[:queries])
    elif shards is None:
        # An out-of-range positive on a GPU has already made the loss NaN. Unlike that of index_select, the backward
        # of indexing is deterministic.
        terms.append(found[batch.positive.clamp(0, passages - 1)])
    else:
        terms.append(_OfPositives.apply(found, batch.positive, shards, communication))
    return terms


class _OfPositives(torch.autograd.Function):
    """The values [M] of the positives of this rank's queries, of values [N] that the ranks hold by passage."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, positive: Tensor, shards: Shards, communication: Communication) -> Tensor:
        ctx.save_for_backward(positive)
        ctx.shards, ctx.communication = shards, communication
        return communication.gather_rows(values, shards.passages)[positive]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (positive,) = ctx.saved_tensors
        pool = upstream.new_zeros(ctx.shards.pool_size).index_put_((positive,), upstream, accumulate=True)
        ctx.communication.reduce_sum(pool)
        return pool[ctx.shards.first_passage :][: ctx.shards.passages[ctx.shards.rank]], None, None, None
