"""The loss of a batch whose rows lie on the ranks of a process group: agreement, choice of exchange, autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from losses.distributed.agreement import Shards, agreed
from losses.distributed.blocks import BlockTiles, ColumnSums, PassageBlock
from losses.distributed.communication import Communication, communication_of
from losses.distributed.forward_state import ForwardState
from losses.distributed.gather import gathered_backward, gathered_forward, own_columns
from losses.distributed.ring import ring_backward, ring_forward
from losses.distributed.torch_blocks import TiledBlocks
from losses.distributed.triton_blocks import FusedBlocks
from losses.inputs import ContrastiveBatch, check_choice, checked_batch, checked_workspace, with_checked_pairs
from losses.precision import Precision, plain_arithmetic, resolve_precision
from losses.triton.kernel_batch import padded_to_16_bytes
from losses.triton.launch import warn_of_step_down, why_not_fused

Exchange = Literal["auto", "ring", "gather"]
RankedImplementation = Literal["auto", "chunked", "triton"]


@dataclass(frozen=True)
class DistributedBatch:
    """This rank's shard of a batch, `positive` being rows of the pool, and how it is to be computed."""

    batch: ContrastiveBatch
    shards: Shards
    communication: Communication
    precision: Precision
    workspace_bytes: int
    fused: bool
    exchange: Literal["ring", "gather"]

    def tiles(self) -> BlockTiles:
        made = FusedBlocks if self.fused else TiledBlocks
        return made(self.batch, self.precision, self.workspace_bytes, self.shards.first_passage)

    def own_block(self, tiles: BlockTiles) -> PassageBlock:
        return PassageBlock(tiles.operand(self.batch.passage), self.batch.passage_ids, self.shards.first_passage)


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
    checks: Callable[[], dict[str, Any]] = dict,
) -> DistributedBatch:
    """Check this rank's arguments and agree with the others on them; `checks` gives more that must be the same on all.

    Raises:
        ValueError: on all ranks, if an argument does not fit on any.
    """
    communication = communication_of(group)
    resolved: list[Precision] = []

    def checked() -> ContrastiveBatch:
        check_choice("implementation with a group", implementation, RankedImplementation)
        check_choice("exchange", exchange, Exchange)
        checked_workspace(workspace_mib)
        batch = checked_batch(
            query, passage, logit_scale, positive, query_ids, passage_ids, symmetric, excluded, shard=True
        )
        resolved.append(resolve_precision(precision, query))
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
            kernels=_by_kernels(query, implementation),
            **checks(),
        )
        return batch

    same: dict[str, Any] = {"symmetric": symmetric, "exchange": exchange, "workspace_mib": workspace_mib}
    batch, shards = agreed(communication, checked, positive, same)
    if positive is None:
        first = shards.first_passage
        batch = replace(batch, given=torch.arange(first, first + len(query), device=query.device))
    elif positive.is_cuda and len(positive):
        # Nobody has looked at them.
        inside = batch.positive.clamp(0, shards.pool - 1)
        scale = torch.where((inside != batch.positive).any(), torch.nan, batch.logit_scale)
        batch = replace(batch, given=inside, logit_scale=scale)
    batch = with_checked_pairs(batch, shards.pool)
    ids = batch.passage_ids
    if ids is not None and batch.query_ids is None:
        of_positives = (
            communication.gather_rows(ids, shards.passages)[batch.positive] if shards.placed else ids[: len(query)]
        )
        batch = replace(batch, query_ids=of_positives)
    workspace_bytes = checked_workspace(workspace_mib)
    fused = bool(same["kernels"])
    width = padded_to_16_bytes(query.shape[1], query.dtype) if fused else query.shape[1]
    # Beside the pool in the products' precision stands the sum of its gradient. Of two ranks the ring holds no less:
    # both blocks, and three sums.
    fits = communication.size == 2 or shards.pool * width * (query.element_size() + 4) <= workspace_bytes
    chosen: Literal["ring", "gather"] = "gather" if exchange == "gather" or (exchange == "auto" and fits) else "ring"
    return DistributedBatch(batch, shards, communication, resolved[0], workspace_bytes, fused, chosen)


def _by_kernels(query: Tensor, implementation: str) -> bool:
    if implementation == "chunked" or (implementation == "auto" and not query.is_cuda):
        return False
    reason = why_not_fused(query)
    if reason is not None and implementation == "triton":
        warn_of_step_down("triton", reason)
    return reason is None


def loss_over_ranks(ranked: DistributedBatch) -> Tensor:
    """Scalar InfoNCE of all ranks' rows, the same bits on every rank; differentiable once.

    Gradients are W times this rank's share, so that their mean over ranks is the gradient of the whole batch's loss.
    Backward exchanges too: every rank calls it, with the same upstream gradient.
    """
    batch = ranked.batch
    return _LossOverRanks.apply(batch.query, batch.passage, batch.logit_scale, ranked)


class _LossOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, passage: Tensor, logit_scale: Tensor, ranked: DistributedBatch) -> Tensor:
        with plain_arithmetic(ranked.precision, query.device):
            tiles = ranked.tiles()
            own = ranked.own_block(tiles)
            batch, shards, communication = ranked.batch, ranked.shards, ranked.communication
            bounds = tiles.bounds(own, positives_here=not shards.placed)
            communication.reduce_max(bounds)
            tiles.settle(bounds)
            meet = ring_forward if ranked.exchange == "ring" else gathered_forward
            visited = meet(tiles, own, batch, shards, communication)
            columns = visited.columns
            here = own_columns(columns, shards) if ranked.exchange == "gather" else columns
            loss = tiles.loss(visited.rows, here if batch.symmetric else None)
            # One order of adding on all ranks: the same bits everywhere.
            shares = communication.gather_rows(loss[None], [1] * communication.size)
            loss = (shares.sum() / shards.all_queries).to(batch.logit_scale.dtype)
            ctx.unit = tiles.unit(_most_owners(columns, tiles, communication) if batch.symmetric else None)
        # What the products read: where that is of half precision, the embeddings need not wait for backward.
        ctx.save_for_backward(tiles.query, own.passage, logit_scale)
        ctx.tiles, ctx.visited, ctx.shards, ctx.communication = tiles, visited, shards, communication
        ctx.precision, ctx.exchange, ctx.symmetric = ranked.precision, ranked.exchange, batch.symmetric
        ctx.dtypes = query.dtype, passage.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let create_graph pass when `upstream` is a constant, and second derivatives vanish.
        if torch.is_grad_enabled():
            raise RuntimeError("the loss over ranks is differentiable once")
        # Asked for: torch says so if one of them has been written over since.
        operand, *_ = ctx.saved_tensors
        want_query, want_passage, want_scale = ctx.needs_input_grad[:3]
        tiles: BlockTiles = ctx.tiles
        visited: ForwardState = ctx.visited
        shards: Shards = ctx.shards
        communication: Communication = ctx.communication
        with plain_arithmetic(ctx.precision, operand.device):
            query_sum = None
            if want_query or want_scale:
                query_sum = visited.rows.table.new_empty(len(operand), tiles.width)
            travel = ring_backward if ctx.exchange == "ring" else gathered_backward
            weights = tiles.line_weights(visited.rows, visited.columns if ctx.symmetric else None, ctx.unit)
            passage_sum = travel(tiles, visited, weights, query_sum, want_passage, shards, communication)
            factors = (ctx.unit, upstream, communication.size / shards.all_queries)
            of_query, of_passage = ctx.dtypes
            query_gradient = passage_gradient = scale_gradient = None
            if query_sum is not None:
                wanted = of_query if want_query else None
                query_gradient, scale_gradient = tiles.gradient(query_sum, *factors, wanted, want_scale)
            if passage_sum is not None:
                passage_gradient, _ = tiles.gradient(passage_sum, *factors, of_passage, False)
        return query_gradient, passage_gradient, scale_gradient, None


def _most_owners(columns: ColumnSums, tiles: BlockTiles, communication: Communication) -> Tensor | None:
    """1-dim: on any rank, by how many queries a passage is owned at most; only half precision asks."""
    if tiles.query.dtype != torch.float16:
        return None
    most = torch.cat([columns.owners, columns.owners.new_ones(1)]).max()[None]
    communication.reduce_max(most)
    return most
