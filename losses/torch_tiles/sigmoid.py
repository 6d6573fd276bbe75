"""Sigmoid loss in tiles, in PyTorch, on any device: memory linear in the batch size, three matrix products in total.

The terms of the loss are independent, so each tile gives its loss and dS in one pass, and dS K and dSᵀ Q are added to
dQ and dK at once. Backward only multiplies the stored gradients by the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from losses.checks import all_finite
from losses.inputs import ContrastiveBatch
from losses.precision import Precision, add_product, matmul_precision
from losses.torch_tiles.tiles import ScoreTiles, TileMasks


def tiled_sigmoid_loss(
    batch: ContrastiveBatch,
    logit_bias: Tensor,
    precision: Precision,
    workspace_bytes: int,
    separated: tuple[TileMasks, Tensor] | None = None,
) -> Tensor:
    """0-dim sigmoid loss of a symmetric batch, differentiable once.

    `separated`, of a batch with `options`, is what losses/masked/sigmoid.py gives: masks of the tiles with the
    derivatives at the positives, and the scores [M] float64 of the positives.

    In addition to inputs, two gradients stored until backward and vectors of M numbers, it uses at most
    `workspace_bytes` (at least one tile), and a float32 accumulator of the passage gradient if the embeddings are in
    half precision.
    """
    leaves = (batch.query, batch.passage, batch.logit_scale, logit_bias)
    wanted = tuple(torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves)
    if not any(wanted):
        return tiled_sigmoid_values(batch, logit_bias, precision, workspace_bytes, wanted, separated)[0]
    return _TiledSigmoidLoss.apply(*leaves, batch, precision, workspace_bytes, wanted, separated)


class _TiledSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        wanted: tuple[bool, ...],
        separated: tuple[TileMasks, Tensor] | None,
    ) -> Tensor:
        loss, *gradients = tiled_sigmoid_values(batch, logit_bias, precision, workspace_bytes, wanted, separated)
        ctx.dtypes = tuple(leaf.dtype for leaf in (query, passage, logit_scale, logit_bias))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*scale_by_upstream(ctx.saved_tensors, upstream, ctx.dtypes), *[None] * 5)


def scale_by_upstream(
    gradients: tuple[Tensor | None, ...], upstream: Tensor, dtypes: tuple[torch.dtype, ...]
) -> list[Tensor | None]:
    """Multiply gradients stored in forward by the upstream gradient and convert them to `dtypes`."""
    # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second derivatives.
    if torch.is_grad_enabled():
        raise RuntimeError("this sigmoid loss is differentiable once: implementation='full' has second derivatives")
    return [
        None if gradient is None else (gradient * upstream).to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def saved_gradient_dtype(embeddings: torch.dtype) -> torch.dtype:
    """Dtype of a gradient stored until backward: float32 for float16, because the loss scale is not applied yet."""
    return torch.float32 if embeddings == torch.float16 else embeddings


def tiled_sigmoid_values(
    batch: ContrastiveBatch,
    logit_bias: Tensor,
    precision: Precision,
    workspace_bytes: int,
    wanted: tuple[bool, ...],
    separated: tuple[TileMasks, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and its gradients with respect to query, passage, logit_scale and logit_bias; None if not wanted.

    With `separated`, tiles mask the positives, whose losses and derivatives are computed from a list.
    """
    want_query, want_passage, want_scale, want_bias = wanted
    (queries, width), passages = batch.query.shape, batch.passage.shape[0]
    with matmul_precision(precision, batch.query.device):
        masks, own_scores = (None, None) if separated is None else separated
        tiles = ScoreTiles(batch, precision, workspace_bytes, masks)
        need_query = want_query or want_scale
        query_gradient = batch.query.new_empty(queries, width, dtype=saved_gradient_dtype(batch.query.dtype))
        score_factor = batch.logit_scale.detach() / queries
        zero = score_factor.new_zeros(())
        query_sum = zero.new_empty(tiles.tile_rows if need_query else 0, width)
        passage_sum = zero.new_zeros(passages if want_passage else 0, width)
        # float64, because many terms are far smaller than the sum.
        loss_sum, bias_sum, scale_sum = zero.new_zeros(3, dtype=torch.float64)
        for rows in tiles.row_blocks():
            query_block = tiles.query_block(rows)
            block_sum = query_sum[: rows.stop - rows.start].zero_()
            for columns in tiles.column_blocks():
                passage_block = tiles.passage_block(columns)
                tile = tiles.scores(rows, columns, query_block, passage_block).add_(logit_bias)
                column, inside = tiles.positive_columns(rows, columns)
                if masks is None:
                    _negate(tile, column, inside)
                losses = torch.logaddexp(tile, zero, out=tiles.scratch(rows, columns))
                loss_sum += losses.sum()
                if not any(wanted):
                    continue
                tile.sigmoid_()
                if masks is None:
                    _negate(tile, column, inside)
                else:
                    tiles.write_pair_gradients(rows, columns)
                bias_sum += tile.sum()
                factor = tiles.products.factor(tile)
                if need_query:
                    add_product(block_sum, factor, passage_block)
                if want_passage:
                    add_product(passage_sum[columns], factor.T, query_block)
            if want_scale:
                # Σ dS ∘ (Q Kᵀ) = Σ Q ∘ (dS K), which costs M·D instead of M·N.
                scale_sum += (block_sum * query_block).sum()
            if want_query:
                query_gradient[rows] = block_sum.mul_(score_factor)
        if own_scores is not None:
            loss_sum += nn.functional.softplus(-own_scores, threshold=500).sum()
        # A score of minus infinity adds zero to the sum, so the inputs themselves are checked.
        loss = torch.where(all_finite(batch.query, batch.passage), loss_sum / queries, torch.nan).to(tiles.dtype)
        return (
            loss,
            query_gradient if want_query else None,
            passage_sum.mul_(score_factor).to(saved_gradient_dtype(batch.passage.dtype)) if want_passage else None,
            (scale_sum / queries).to(tiles.dtype) if want_scale else None,
            (bias_sum / queries).to(tiles.dtype) if want_bias else None,
        )


def _negate(tile: Tensor, column: Tensor, inside: Tensor) -> None:
    """Negate the positives: their loss is softplus(−x) and its derivative −σ(−x)."""
    own = tile.gather(1, column)
    tile.scatter_(1, column, torch.where(inside, -own, own))
