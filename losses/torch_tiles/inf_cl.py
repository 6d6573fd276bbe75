"""InfoNCE in tiles, in PyTorch, on any device: memory linear in the batch size, four matrix products in total.

Forward computes each tile of S = logit_scale · Q Kᵀ once and accumulates the softmax statistics of its rows and
columns. Backward recomputes the tile, turns it into dS in place, and adds dS K to dQ and dSᵀ Q to dK. docs/design/
losses.md has the derivation and the counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.inputs import ContrastiveBatch
from losses.precision import Precision, add_product, matmul_precision
from losses.torch_tiles.row_terms import Shares, column_counts
from losses.torch_tiles.statistics import (
    Statistics,
    negative_log_probability,
    score_statistics,
)
from losses.torch_tiles.tiles import ScoreTiles


def tiled_loss(batch: ContrastiveBatch, precision: Precision, workspace_bytes: int) -> Tensor:
    """0-dim InfoNCE loss of the batch, differentiable once with respect to query, passage and logit_scale.

    In addition to inputs, gradients and vectors of M and N numbers, it uses at most `workspace_bytes` (at least one
    tile), and a float32 accumulator of the passage gradient if the embeddings are in half precision.
    """
    return _TiledLoss.apply(
        batch.query,
        batch.passage,
        batch.logit_scale,
        batch.further,
        batch.positive,
        batch.query_ids,
        batch.passage_ids,
        batch.excluded,
        batch.symmetric,
        batch.single_partition,
        precision,
        workspace_bytes,
    )


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        further: Tensor | None,
        positive: Tensor,
        query_ids: Tensor | None,
        passage_ids: Tensor | None,
        excluded: Tensor | None,
        symmetric: bool,
        single_partition: bool,
        precision: Precision,
        workspace_bytes: int,
    ) -> Tensor:
        masks = (query_ids, passage_ids, symmetric, False, excluded)
        batch = ContrastiveBatch(query, passage, logit_scale, positive, *masks)
        with matmul_precision(precision, query.device):
            statistics = score_statistics(ScoreTiles(batch, precision, workspace_bytes))
            # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
            shares = None if further is None else shares_of(statistics, positive, further, single_partition)
            loss = torch.where(all_finite(query, passage), loss_value(statistics, positive, shares), torch.nan)
        ctx.save_for_backward(query, passage, logit_scale, positive, query_ids, passage_ids, excluded)
        ctx.symmetric, ctx.precision, ctx.workspace_bytes = symmetric, precision, workspace_bytes
        ctx.statistics, ctx.shares = statistics, shares
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled loss is differentiable once: implementation='full' has second derivatives")
        query, passage, logit_scale, positive, query_ids, passage_ids, excluded = ctx.saved_tensors
        masks = (query_ids, passage_ids, ctx.symmetric, False, excluded)
        batch = ContrastiveBatch(query, passage, logit_scale, positive, *masks)
        with matmul_precision(ctx.precision, query.device):
            tiles = ScoreTiles(batch, ctx.precision, ctx.workspace_bytes)
            of_query, of_passage, of_scale = ctx.needs_input_grad[:3]
            gradients = score_gradients(tiles, ctx.statistics, upstream, of_query, of_passage, of_scale, ctx.shares)
        of_further = None
        if ctx.shares is not None:
            of_further = ctx.shares.further_gradient(ctx.symmetric) * (upstream / len(positive))
        return *gradients, of_further, None, None, None, None, None, None, None, None


def shares_of(statistics: Statistics, positive: Tensor, further: Tensor, single_partition: bool) -> Shares:
    """Shares of each row's denominator, with the log-sum-exps `further` [k, M] of negatives outside the pool."""
    column = None
    if single_partition:
        assert statistics.column_shift is not None and statistics.column_sum is not None
        column = (statistics.column_shift + statistics.column_sum.log())[positive]
    return Shares.of(statistics.row_shift + statistics.row_sum.log(), column, further)


def loss_value(statistics: Statistics, positive: Tensor, shares: Shares | None = None) -> Tensor:
    """Mean negative log-probability of the positives: over rows, or over rows and the positives' columns."""
    score = statistics.positive_score
    loss = negative_log_probability(score, statistics.row_shift, statistics.row_sum).mean()
    if shares is not None:
        loss = loss - shares.log_row.mean()
    if statistics.column_shift is None or statistics.column_sum is None or (shares and shares.column is not None):
        return loss
    columns = negative_log_probability(score, statistics.column_shift[positive], statistics.column_sum[positive])
    return (loss + columns.mean()) / 2


def score_gradients(
    tiles: ScoreTiles,
    statistics: Statistics,
    upstream: Tensor,
    query: bool,
    passage: bool,
    logit_scale: bool,
    shares: Shares | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, passage and logit_scale from the recomputed tiles; None for those not asked for.

    The tiles hold M · dS. The sums are multiplied by 1/M, logit_scale and the upstream gradient at the end.
    """
    batch, width = tiles.batch, tiles.batch.query.shape[1]
    queries, passages = batch.query.shape[0], batch.passage.shape[0]
    mean_factor = upstream.to(tiles.dtype) / queries
    score_factor = mean_factor * batch.logit_scale
    weights = softmax_weights(statistics, batch.positive, shares)
    query_gradient = torch.empty_like(batch.query) if query else None
    query_sum = torch.empty(tiles.tile_rows, width, dtype=tiles.dtype, device=tiles.device)
    passage_sum = torch.zeros(passages, width, dtype=tiles.dtype, device=tiles.device) if passage else None
    scale_sum = torch.zeros((), dtype=tiles.dtype, device=tiles.device)
    for rows in tiles.row_blocks():
        query_block = tiles.query_block(rows)
        block_sum = query_sum[: rows.stop - rows.start].zero_()
        wanted_sum = block_sum if query or logit_scale else None
        add_row_gradients(tiles, statistics, weights, rows, query_block, wanted_sum, passage_sum)
        if logit_scale:
            # Σ dS ∘ (Q Kᵀ) = Σ Q ∘ (dS K), which costs M·D instead of M·N.
            scale_sum += (block_sum * query_block).sum()
        if query_gradient is not None:
            query_gradient[rows] = block_sum.mul_(score_factor)
    passage_gradient = passage_sum.mul_(score_factor).to(batch.passage.dtype) if passage_sum is not None else None
    return query_gradient, passage_gradient, scale_sum * mean_factor if logit_scale else None


def add_row_gradients(
    tiles: ScoreTiles,
    statistics: Statistics,
    weights: tuple[Tensor, Tensor | None],
    rows: slice,
    query_block: Tensor,
    query_sum: Tensor | None,
    passage_sum: Tensor | None,
) -> None:
    """Add M · dS K of these rows to query_sum [rows, D] and M · dSᵀ Q to passage_sum [N, D]; None skips a sum."""
    for columns in tiles.column_blocks():
        passage_block = tiles.passage_block(columns)
        tile = tiles.scores(rows, columns, query_block, passage_block)
        to_score_gradient(tile, tiles, statistics, weights, rows, columns)
        factor = tiles.products.factor(tile)
        if query_sum is not None:
            add_product(query_sum, factor, passage_block)
        if passage_sum is not None:
            add_product(passage_sum[columns], factor.T, query_block)


def to_score_gradient(
    tile: Tensor,
    tiles: ScoreTiles,
    statistics: Statistics,
    weights: tuple[Tensor, Tensor | None],
    rows: slice,
    columns: slice,
) -> None:
    """Turn the tile S[rows, columns] into M · dS in place: weighted softmaxes, minus one at the positives."""
    row_weight, column_weight = weights
    if column_weight is None or statistics.column_shift is None:
        tile.sub_(statistics.row_shift[rows, None]).exp_().mul_(row_weight[rows, None])
    elif statistics.constant is not None:
        scratch = tiles.scratch(rows, columns)
        torch.add(row_weight[rows, None], column_weight[columns], out=scratch)
        tile.sub_(statistics.constant).exp_().mul_(scratch)
    else:
        scratch = tiles.scratch(rows, columns)
        torch.sub(tile, statistics.column_shift[columns], out=scratch).exp_().mul_(column_weight[columns])
        tile.sub_(statistics.row_shift[rows, None]).exp_().mul_(row_weight[rows, None]).add_(scratch)
    if tiles.masks is not None:
        tiles.write_pair_gradients(rows, columns)
        return
    column, inside = tiles.positive_columns(rows, columns)
    tile.scatter_(1, column, tile.gather(1, column) - inside.to(tile.dtype))


def softmax_weights(
    statistics: Statistics, positive: Tensor, shares: Shares | None = None
) -> tuple[Tensor, Tensor | None]:
    """Factors of exp(S − shift) in M · dS, for rows [M] and, for a symmetric loss, columns [N].

    A factor is the weight of a row or column in the loss divided by its sum. A column counts once for each query whose
    positive it is, so it is zero for hard negatives.
    """
    symmetric = statistics.column_sum is not None
    share = 1 if shares is None else shares.row_factor(symmetric)
    if statistics.column_sum is None:
        return share / statistics.row_sum, None
    if shares is not None and shares.column is not None:
        positive_count = column_counts(positive, shares.column, len(statistics.column_sum))
    else:
        positive_count = torch.zeros_like(statistics.column_sum).index_add_(
            0, positive, torch.ones_like(statistics.row_sum)
        )
    column_weight = torch.where(positive_count > 0, positive_count / (2 * statistics.column_sum), 0)
    return share / (2 * statistics.row_sum), column_weight
