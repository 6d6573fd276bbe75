"""InfoNCE with `positives`, `negatives` or `statistics`, in one process or over ranks: tiles sum over negatives alone.

Forward first computes the products of the positive pairs, from which the thresholds of `limit` and `guide` follow. The
tiles then mask the positives and give N_i and N'_j; losses/masked/pairs.py turns these into the loss. Backward
recomputes the tiles, and writes the derivatives at the pairs into them before they are multiplied. With `hardness`,
the tiles use the exponents (logit_scale + β) · q_i · k_j, whose exponentials are the weighted terms.

Over ranks in a ring, if a positive may be on another rank, the passages make a round of their own for these products.
Per passage of the pool, each rank stores a few float64 numbers, which are summed over ranks: (M + N) · 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.api import DistributedBatch, gradients_over_ranks
from losses.distributed.blocks import BlockBackend, ColumnSums, GradientWeights, PassageBlock
from losses.distributed.communication import Communication
from losses.distributed.gather import gather_forward, gathered_pool
from losses.distributed.local import LocalCommunication
from losses.distributed.ring import receive_buffer, ring_forward
from losses.inputs import ContrastiveBatch
from losses.masked.pairs import PairLosses, PositivePairs, pair_losses
from losses.masked.statistics import finished_statistics
from losses.options import Statistics
from losses.precision import Precision, matmul_precision
from losses.reference import limit_thresholds
from losses.torch_tiles.masks import NegativeMasks, PairGradients, RowStatistics


def negatives_loss(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, fused: bool
) -> tuple[Tensor, Statistics | None]:
    """0-dim loss of a batch with `options` in one process, and statistics if wanted; by kernels if `fused`."""
    return negatives_loss_over_ranks(of_one_process(batch, precision, workspace_bytes, fused))


def negatives_loss_over_ranks(sharded: DistributedBatch) -> tuple[Tensor, Statistics | None]:
    """0-dim loss over the rows of all ranks, and statistics of this rank's queries if wanted; differentiable once.

    Gradients are those of `losses.distributed.api.loss_over_ranks`. In addition to its memory, backward stores the
    sums of all query gradients in float32.
    """
    batch = sharded.batch
    loss, *found = _NegativesLoss.apply(batch.query, batch.passage, batch.logit_scale, batch.further, sharded)
    return loss, Statistics(*found) if found else None


class _NegativesLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        further: Tensor | None,
        sharded: DistributedBatch,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        shards, communication = sharded.shards, sharded.communication
        with matmul_precision(sharded.precision, query.device):
            sharded, pairs = _with_pairs_excluded(sharded)
            batch, options = sharded.batch, sharded.batch.options
            assert options is not None
            backend = sharded.backend()
            own = sharded.own_block(backend)
            pool = gathered_pool(own, shards, communication) if sharded.exchange == "gather" else None
            remote = shards.positive_given or options.reduction != "single"
            blocks = [pool] if pool is not None else _ring(own, shards, communication) if remote else [own]
            scores, masks = _positive_scores(backend, batch, pairs, blocks)
            backend.masks = masks

            bounds = backend.score_bounds(own, positives_local=False)
            # Sums over negatives may be smaller than any positive, but what matters to a loss is not.
            bounds[2] = torch.cat([-scores, scores.new_zeros(1)]).max()
            communication.reduce_max(bounds)
            backend.set_bounds(bounds)
            forward = ring_forward if pool is None else gather_forward
            state = forward(backend, own if pool is None else pool, batch, shards, communication)

            rows = _natural(backend, state.rows.shift, state.rows.total)
            columns = _pool_columns(backend, state.columns, sharded) if batch.symmetric else None
            negatives = rows
            if further is not None:
                # The negatives outside the pool are further terms of N_i.
                negatives = rows[0], torch.cat([rows[1][None], further.double()]).logsumexp(0)
            found = pair_losses(
                pairs, scores, negatives, columns, options.reduction, shards.total_queries, communication
            )
            shares = communication.gather_rows(found.loss_sum[None], [1] * communication.size)
            loss = (shares.sum() / shards.total_queries).to(logit_scale.dtype)
            loss = torch.where(bounds[3] > 0, torch.nan, loss)
            ctx.ds_scale = backend.choose_ds_scale(found.largest.float())
            ctx.further_gradient = None
            if further is not None:
                share = torch.where(negatives[1] > -torch.inf, (further - negatives[1]).exp(), 0)
                ctx.further_gradient = (found.row_share * share).to(further.dtype)
            ctx.weights = _weights(found, ctx.ds_scale, sharded, state.rows.table)
            values = (found.pair_gradient * ctx.ds_scale).to(state.rows.table.dtype)
            backend.pair_gradients = PairGradients(pairs.rows, pairs.columns, values)
            # Minus infinity where all of a row is masked; its exponents are too.
            state.rows.shift.copy_(torch.where(state.rows.shift == -torch.inf, 0, state.rows.shift))
            statistics = _statistics(backend, batch, pairs, scores, rows, shards, communication)
        ctx.save_for_backward(backend.query, own.passage, logit_scale)
        # The guide's embeddings, too, are held as operands only.
        options = replace(options, guide_query=None, guide_passage=None)
        backend.batch = replace(backend.batch, options=options, further=None)
        ctx.backend, ctx.state, ctx.sharded = backend, state, replace(sharded, batch=backend.batch)
        ctx.dtypes = query.dtype, passage.dtype
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("this loss is differentiable once: implementation='full' has second derivatives")
        if upstream is None:
            return None, None, None, None, None
        # Reading saved_tensors makes autograd check that no input was modified in place.
        operand, *_ = ctx.saved_tensors
        with matmul_precision(ctx.sharded.precision, operand.device):
            gradients = gradients_over_ranks(
                ctx.backend, ctx.state, ctx.sharded, ctx.weights, upstream, ctx.dtypes, ctx.needs_input_grad[:3]
            )
        of_further = None
        if ctx.further_gradient is not None:
            sharded = ctx.sharded
            of_further = ctx.further_gradient * (upstream * sharded.communication.size / sharded.shards.total_queries)
        return *gradients, of_further, None


def _with_pairs_excluded(sharded: DistributedBatch) -> tuple[DistributedBatch, PositivePairs]:
    """The batch with all further positives excluded from its tiles, and its positive pairs."""
    batch = sharded.batch
    pairs = PositivePairs.of(batch, sharded.shards.pool_size)
    further = batch.options.pairs if batch.options is not None else None
    lists = [each for each in (batch.excluded, further) if each is not None]
    excluded = torch.cat(lists) if lists else None
    return replace(sharded, batch=replace(batch, excluded=excluded)), pairs


def _ring(own: PassageBlock, shards: Shards, communication: Communication) -> Iterator[PassageBlock]:
    """All blocks of the pool, this rank's own first; the next one is transferred at the same time."""
    block = own
    for step in range(communication.size):
        next_block, outgoing, incoming = block, list[Tensor](), list[Tensor]()
        if step < communication.size - 1:
            next_block = receive_buffer(block, (communication.rank - step - 1) % communication.size, shards)
            outgoing, incoming = block.tensors(), next_block.tensors()
        wait = communication.start_exchange(outgoing, incoming, 1)
        yield block
        wait()
        block = next_block


def _positive_scores(
    backend: BlockBackend, batch: ContrastiveBatch, pairs: PositivePairs, blocks: Any
) -> tuple[Tensor, NegativeMasks]:
    """S [P] float64 of the positive pairs, and the masks that follow from the products of queries and positives."""
    options = batch.options
    assert options is not None
    products = batch.logit_scale.new_zeros(len(pairs.rows))
    guide_query = guide_products = None
    if options.guide_query is not None:
        guide_query, guide_products = backend.prepare_passages(options.guide_query), products.new_zeros(len(pairs.own))
    for block in blocks:
        if not len(block.passage) or not len(pairs.rows):
            continue
        backend.pair_products(backend.query, block.passage, pairs.rows, pairs.columns - block.first, products)
        if guide_query is not None and guide_products is not None and block.guide is not None:
            rows, columns = pairs.rows[pairs.own], pairs.columns[pairs.own] - block.first
            backend.pair_products(guide_query, block.guide, rows, columns, guide_products)
    own = products[pairs.own]
    masks = NegativeMasks(
        own,
        None if options.limit is None else limit_thresholds(options.limit, own),
        guide_query,
        None if guide_products is None else guide_products - options.guide_margin,
        RowStatistics.empty(len(own), own.dtype, own.device) if options.statistics else None,
    )
    return products.double() * batch.logit_scale.double(), masks


def positive_scores(sharded: DistributedBatch, pairs: PositivePairs) -> tuple[Tensor, NegativeMasks, Tensor | None]:
    """`_positive_scores`, and the guide's embeddings of this rank's passages as operands, or None."""
    backend = sharded.backend()
    own = sharded.own_block(backend)
    remote = sharded.shards.positive_given
    blocks = _ring(own, sharded.shards, sharded.communication) if remote else [own]
    return *_positive_scores(backend, sharded.batch, pairs, blocks), own.guide


def of_one_process(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, fused: bool
) -> DistributedBatch:
    """The batch as that of a group of one rank."""
    shards = Shards(0, (len(batch.query),), (len(batch.passage),), positive_given=batch.given_positive is not None)
    return DistributedBatch(batch, shards, LocalCommunication(), precision, workspace_bytes, fused, "gather")


def _natural(backend: BlockBackend, shift: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts, and logarithms of the sums, as exponents of e in float64."""
    wide = backend.exponent_unit * shift.double()
    return wide, wide + total.double().log()


def _pool_columns(backend: BlockBackend, columns: ColumnSums, sharded: DistributedBatch) -> tuple[Tensor, Tensor]:
    """Shifts and logarithms of the sums of all columns of the pool, [N] each, on every rank."""
    found = torch.stack(_natural(backend, columns.shift, columns.total), 1)
    if sharded.exchange == "ring":
        # Rank r has the finished sums of the next rank's passages.
        counts = sharded.shards.passages
        found = sharded.communication.gather_rows(found, [*counts[1:], counts[0]])
        found = found.roll(counts[0], 0)
    shift, negatives = found.unbind(1)
    return shift, negatives


def _weights(found: PairLosses, ds_scale: Tensor, sharded: DistributedBatch, like: Tensor) -> GradientWeights:
    """Weights of this rank's rows, and of the columns of the block, or of the pool, that backward begins with."""
    column = None
    if found.column_weight is not None:
        column = found.column_weight
        if sharded.exchange == "ring":
            following = (sharded.shards.rank + 1) % sharded.communication.size
            first = sharded.shards.first(following)
            column = column[first : first + sharded.shards.passages[following]]
        column = (column * ds_scale).to(like.dtype)
    return GradientWeights((found.row_weight * ds_scale).to(like.dtype), column, ds_scale)


def _statistics(
    backend: BlockBackend,
    batch: ContrastiveBatch,
    pairs: PositivePairs,
    scores: Tensor,
    rows: tuple[Tensor, Tensor],
    shards: Shards,
    communication: Communication,
) -> tuple[Tensor, ...]:
    """The fields of `Statistics`, or nothing if they are not wanted."""
    counted = backend.masks.statistics if backend.masks is not None else None
    if counted is None or batch.options is None:
        return ()
    shift, negatives = rows
    mean_exponent = shift + backend.exponent_unit * counted.weighted.double() / (negatives - shift).exp()
    scale = batch.logit_scale.double()
    hardest_score = backend.exponent_unit * counted.hardest_exponent.double()
    if batch.options.hardness:
        hardest_score = hardest_score * (scale / (scale + batch.options.hardness))
    sizes = (shards.total_queries, shards.pool_size)
    return finished_statistics(
        counted, pairs, scores, negatives, mean_exponent, hardest_score, sizes, batch.logit_scale.dtype, communication
    )
