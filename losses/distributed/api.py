"""The loss over a process group: checks across ranks, choice of the exchange, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from losses.checks import check_choice, checked_workspace
from losses.distributed.agreement import Shards, agree_on_batch
from losses.distributed.blocks import BlockBackend, ColumnSums, GradientFactors, GradientWeights, PassageBlock
from losses.distributed.communication import Communication, communication_of
from losses.distributed.forward_state import ForwardState
from losses.distributed.further import RankMerge, column_counts_over_ranks, shares_over_ranks
from losses.distributed.gather import gather_backward, gather_forward, gathered_pool, own_columns
from losses.distributed.objectives.choice import backend_of
from losses.distributed.ring import ring_backward, ring_forward
from losses.inputs import ContrastiveBatch, checked_batch, with_nan_for_invalid_pairs
from losses.option_checks.combinations import check_combination
from losses.option_checks.masked import options_to_compare, with_nan_for_invalid_positives, with_options
from losses.option_checks.objective import INFO_NCE, Objective, checked_objective
from losses.options import Matryoshka, Negatives, Positives, Teacher, TeacherScores
from losses.precision import Precision, matmul_precision, resolve_precision
from losses.triton.kernel_batch import round_up_to_16_bytes
from losses.triton.launch import warn_fallback, why_not_fused

Exchange = Literal["auto", "ring", "gather"]
DistributedImplementation = Literal["auto", "chunked", "triton"]


@dataclass(frozen=True)
class DistributedBatch:
    """This rank's shard of a batch, whose `positive` are rows of the pool, and how the loss is computed."""

    batch: ContrastiveBatch
    shards: Shards
    communication: Communication
    precision: Precision
    workspace_bytes: int
    fused: bool
    exchange: Literal["ring", "gather"]
    objective: Objective = INFO_NCE

    def backend(self) -> BlockBackend:
        first = self.shards.first_passage
        return backend_of(self.batch, self.objective, self.precision, self.workspace_bytes, first, self.fused)

    def merge(self) -> RankMerge:
        return RankMerge(self.batch, self.shards, self.communication, self.exchange)

    def own_block(self, backend: BlockBackend) -> PassageBlock:
        guide = self.batch.options.guide_passage if self.batch.options is not None else None
        return PassageBlock(
            backend.prepare_passages(self.batch.passage),
            self.batch.passage_ids,
            self.shards.first_passage,
            None if guide is None else backend.prepare_passages(guide),
            backend.own_extras(),
        )


def distributed_batch(
    group: Any,
    query: Tensor,
    passage: Tensor,
    logit_scale: float | Tensor,
    positive: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    *,
    symmetric: bool,
    precision: Precision,
    implementation: str,
    exchange: Exchange,
    workspace_mib: float,
    positives: Positives | None = None,
    negatives: Negatives | None = None,
    statistics: bool = False,
    matryoshka: Matryoshka | None = None,
    teacher: Teacher | TeacherScores | None = None,
    checks: Callable[[], dict[str, Any]] = dict,
) -> DistributedBatch:
    """Check this rank's arguments and compare them with those of the other ranks.

    Args:
        checks: Returns further values that must be the same on all ranks.

    Raises:
        ValueError: On all ranks, if an argument is invalid on any.
    """
    communication = communication_of(group)
    resolved: list[Precision] = []
    objectives: list[Objective] = []

    def checked() -> ContrastiveBatch:
        check_choice("implementation with a group", implementation, DistributedImplementation)
        check_choice("exchange", exchange, Exchange)
        checked_workspace(workspace_mib)
        batch = checked_batch(
            query, passage, logit_scale, positive, query_ids, passage_ids, symmetric, excluded, shard=True
        )
        check_combination(positives, negatives, statistics, matryoshka, teacher, implementation)
        batch = with_options(batch, positives, negatives, statistics, shard=True)
        resolved.append(resolve_precision(precision, query))
        objectives.append(checked_objective(batch, matryoshka, teacher, shard=True))
        same.update(
            dimensions=query.shape[1],
            dtype=query.dtype,
            device=query.device.type,
            requires_grad=[
                torch.is_grad_enabled() and leaf.requires_grad for leaf in (query, passage, batch.logit_scale)
            ],
            query_ids="given" if query_ids is not None else "not given",
            passage_ids="given" if passage_ids is not None else "not given",
            precision=resolved[-1],
            kernels=uses_kernels(query, implementation),
            options=options_to_compare(batch.options),
            **objectives[-1].compared(),
            **checks(),
        )
        return batch

    same: dict[str, Any] = {"symmetric": symmetric, "exchange": exchange, "workspace_mib": workspace_mib}
    batch, shards = agree_on_batch(communication, checked, positive, same)
    if positive is None:
        first = shards.first_passage
        batch = replace(batch, given_positive=torch.arange(first, first + len(query), device=query.device))
    batch = with_nan_for_invalid_positives(with_nan_for_invalid_rows(batch, shards.pool_size), shards.pool_size)
    ids = batch.passage_ids
    if ids is not None and batch.query_ids is None:
        positive_ids = (
            communication.gather_rows(ids, shards.passages)[batch.positive]
            if shards.positive_given
            else ids[: len(query)]
        )
        batch = replace(batch, query_ids=positive_ids)
    workspace_bytes = checked_workspace(workspace_mib)
    fused = bool(same["kernels"])
    width = round_up_to_16_bytes(query.shape[1], query.dtype) if fused else query.shape[1]
    if batch.options is not None and batch.options.guide_passage is not None:
        width += batch.options.guide_passage.shape[1]
    # "gather" stores the pool in the operand dtype and the float32 sum of its gradient. With two ranks the ring stores
    # no less: both blocks, and three gradient sums.
    fits = communication.size == 2 or shards.pool_size * width * (query.element_size() + 4) <= workspace_bytes
    chosen: Literal["ring", "gather"] = "gather" if exchange == "gather" or (exchange == "auto" and fits) else "ring"
    return DistributedBatch(batch, shards, communication, resolved[0], workspace_bytes, fused, chosen, objectives[0])


def with_nan_for_invalid_rows(batch: ContrastiveBatch, passages: int) -> ContrastiveBatch:
    """Set logit_scale, and thereby the loss, to NaN if a positive or an excluded pair on a GPU is out of range.

    Values on a GPU are not checked on the host. `passages` is the size of the pool.
    """
    positive = batch.given_positive
    if positive is not None and positive.is_cuda and len(positive):
        inside = positive.clamp(0, passages - 1)
        scale = torch.where((inside != positive).any(), torch.nan, batch.logit_scale)
        batch = replace(batch, given_positive=inside, logit_scale=scale)
    return with_nan_for_invalid_pairs(batch, passages)


def uses_kernels(query: Tensor, implementation: str) -> bool:
    """Whether Triton kernels compute the loss; warns if they were requested and cannot run."""
    if implementation == "chunked" or (implementation == "auto" and not query.is_cuda):
        return False
    reason = why_not_fused(query)
    if reason is not None and implementation == "triton":
        warn_fallback("triton", reason)
    return reason is None


def loss_over_ranks(sharded: DistributedBatch) -> Tensor:
    """0-dim InfoNCE loss over the rows of all ranks, the same bits on every rank; differentiable once.

    Gradients are W times this rank's contribution, so their mean over ranks is the gradient of the whole batch.
    Backward communicates too: every rank must call it, with the same upstream gradient.
    """
    batch = sharded.batch
    return _LossOverRanks.apply(batch.query, batch.passage, batch.logit_scale, batch.further, sharded)


class _LossOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        further: Tensor | None,
        sharded: DistributedBatch,
    ) -> Tensor:
        with matmul_precision(sharded.precision, query.device):
            backend = sharded.backend()
            own = sharded.own_block(backend)
            batch, shards, communication = sharded.batch, sharded.shards, sharded.communication
            bounds = backend.score_bounds(own, positives_local=not shards.positive_given)
            communication.reduce_max(bounds)
            backend.set_bounds(bounds)
            forward = ring_forward if sharded.exchange == "ring" else gather_forward
            blocks = own if sharded.exchange == "ring" else gathered_pool(own, shards, communication)
            state = forward(backend, blocks, batch, shards, communication)
            columns = state.columns
            loss_columns = own_columns(columns, shards) if sharded.exchange == "gather" else columns
            both = batch.symmetric and not batch.single_partition
            loss = backend.loss_sum(state.rows, loss_columns if both else None)
            ctx.shares = ctx.column_share = None
            if further is not None:
                ctx.shares = shares_over_ranks(backend, state, sharded.merge(), further)
                loss -= ctx.shares.log_row.sum(dtype=loss.dtype) / (2 if both else 1)
                if batch.single_partition:
                    ctx.column_share = column_counts_over_ranks(state.block, sharded.merge(), ctx.shares)
            # The same order of summation on all ranks gives the same bits.
            shares = communication.gather_rows(loss[None], [1] * communication.size)
            loss = (shares.sum() / shards.total_queries).to(batch.logit_scale.dtype)
            ctx.ds_scale = backend.choose_ds_scale(
                _max_positive_count(columns, backend, communication) if batch.symmetric else None
            )
        # Save the operands instead of the embeddings, which can be freed if the operands are copies in half precision.
        ctx.save_for_backward(backend.query, own.passage, logit_scale)
        ctx.backend, ctx.state, ctx.symmetric = backend, state, batch.symmetric
        ctx.sharded = replace(sharded, batch=backend.batch)
        ctx.dtypes = query.dtype, passage.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("the loss over ranks is differentiable once")
        # Reading saved_tensors makes autograd check that no input was modified in place.
        operand, *_ = ctx.saved_tensors
        with matmul_precision(ctx.sharded.precision, operand.device):
            columns = ctx.state.columns if ctx.symmetric else None
            if ctx.column_share is not None:
                columns = ColumnSums(torch.stack([*ctx.state.columns.table[:2], ctx.column_share, ctx.column_share]))
            weights = ctx.backend.gradient_weights(ctx.state.rows, columns, ctx.ds_scale)
            of_further = None
            if ctx.shares is not None:
                weights.row.mul_(ctx.shares.row_factor(ctx.symmetric))
                factor = upstream * (ctx.sharded.communication.size / ctx.sharded.shards.total_queries)
                of_further = ctx.shares.further_gradient(ctx.symmetric) * factor
            gradients = gradients_over_ranks(
                ctx.backend, ctx.state, ctx.sharded, weights, upstream, ctx.dtypes, ctx.needs_input_grad[:3]
            )
        return *gradients, of_further, None


def gradients_over_ranks(
    backend: BlockBackend,
    state: ForwardState,
    sharded: DistributedBatch,
    weights: GradientWeights,
    upstream: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of this rank's query, passage and logit_scale; None for those not wanted.

    Args:
        weights: Those of the block, or pool, of `state`.
        dtypes: Dtypes of the query and passage gradients.
    """
    shards, communication = sharded.shards, sharded.communication
    want_query, want_passage, want_scale = wanted
    query_sum = None
    if want_query or want_scale:
        query_sum = state.rows.table.new_empty(len(backend.query), backend.width)
    backward = ring_backward if sharded.exchange == "ring" else gather_backward
    passage_sum = backward(backend, state, weights, query_sum, want_passage, shards, communication)
    factors = GradientFactors(weights.ds_scale, upstream, communication.size / shards.total_queries)
    query_gradient = passage_gradient = scale_gradient = None
    if query_sum is not None:
        dtype = dtypes[0] if want_query else None
        query_gradient, scale_gradient = backend.finish_gradient(query_sum, factors, dtype, want_scale, True)
    if passage_sum is not None:
        passage_gradient, _ = backend.finish_gradient(passage_sum, factors, dtypes[1], False, False)
    return query_gradient, passage_gradient, scale_gradient


def _max_positive_count(columns: ColumnSums, backend: BlockBackend, communication: Communication) -> Tensor | None:
    """The largest number of queries, over all ranks, that share a positive; only float16 needs it."""
    if backend.query.dtype != torch.float16:
        return None
    counts = columns.positive_count.flatten()
    max_count = torch.cat([counts, counts.new_ones(1)]).max()[None]
    communication.reduce_max(max_count)
    return max_count
