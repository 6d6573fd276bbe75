"""InfoNCE of small batches on a GPU: the whole score matrix, in as few launches as its three products allow.

Below some thousands of pairs a step takes as long as its launches: forward is a product and two kernels, backward a
kernel and two products (kernels/dense.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.batch import ContrastiveBatch
from losses.precision import BlockProducts, Precision, plain_arithmetic

# Of the products, which wait for backward, and of dS.
BYTES_PER_SCORE = 8


def fits_dense(batch: ContrastiveBatch, workspace_bytes: int) -> bool:
    """Whether the matrix stays within the workspace."""
    return batch.query.shape[0] * batch.passage.shape[0] * BYTES_PER_SCORE <= workspace_bytes


def dense_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """Scalar InfoNCE of the batch, differentiable once in query, passage and logit_scale."""
    return _DenseLoss.apply(
        batch.query,
        batch.passage,
        batch.logit_scale,
        batch.positive,
        batch.query_ids,
        batch.passage_ids,
        batch.symmetric,
        batch.diagonal,
        precision,
    )


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        import triton

        from losses.kernels.dense import (
            COLUMN_LINES,
            COLUMN_STEP,
            ROW_LINES,
            ROW_STEP,
            line_sums_kernel,
            mean_loss_kernel,
        )

        *tensors, precision = arguments
        batch = ContrastiveBatch(*tensors)
        rows, columns = len(batch.query), len(batch.passage)
        with plain_arithmetic(precision, batch.query.device):
            products = _scores(batch.query, batch.passage, precision)
        # Rows' sums and shifts, then columns'.
        lines = products.new_empty(2 * (rows + columns))
        sums = lines.split([rows, rows, columns, columns])
        programs = max(triton.cdiv(rows, ROW_LINES), triton.cdiv(columns, COLUMN_LINES) if batch.symmetric else 0)
        line_sums_kernel[(programs, 2 if batch.symmetric else 1)](
            products,
            batch.logit_scale,
            batch.positive,
            batch.query_ids,
            batch.passage_ids,
            *sums,
            rows,
            columns,
            HAS_IDS=batch.query_ids is not None,
            ROW_LINES=ROW_LINES,
            ROW_STEP=ROW_STEP,
            COLUMN_LINES=COLUMN_LINES,
            COLUMN_STEP=COLUMN_STEP,
        )
        loss = products.new_empty(())
        mean_loss_kernel[(1,)](
            products,
            batch.logit_scale,
            batch.positive,
            *sums,
            loss,
            rows,
            columns,
            SYMMETRIC=batch.symmetric,
            BLOCK=1024,
        )
        ctx.save_for_backward(*tensors[:6], products, lines)
        ctx.options = tensors[6:], precision
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        import triton

        from losses.kernels.dense import TILE_M, TILE_N, dense_gradient_kernel

        # once_differentiable would let create_graph pass when `upstream` is a constant, and second derivatives vanish.
        if torch.is_grad_enabled():
            raise RuntimeError("the dense loss is differentiable once: implementation='full' has second derivatives")
        *tensors, products, lines = ctx.saved_tensors
        options, precision = ctx.options
        batch = ContrastiveBatch(*tensors, *options)
        rows, columns = products.shape
        owners = None
        if batch.symmetric and not batch.diagonal:
            owners = lines.new_zeros(columns).index_add_(0, batch.positive, lines.new_ones(rows))
        grid = (triton.cdiv(rows, TILE_M), triton.cdiv(columns, TILE_N))
        shares = lines.new_empty(grid)
        query, passage = (_operand(side, precision) for side in (batch.query, batch.passage))
        gradient = torch.empty_like(products, dtype=query.dtype)
        dense_gradient_kernel[grid](
            products,
            batch.logit_scale,
            upstream,
            batch.positive,
            owners,
            batch.query_ids,
            batch.passage_ids,
            *lines.split([rows, rows, columns, columns]),
            gradient,
            shares,
            rows,
            columns,
            SYMMETRIC=batch.symmetric,
            DIAGONAL=batch.diagonal,
            HAS_IDS=batch.query_ids is not None,
            TILE_M=TILE_M,
            TILE_N=TILE_N,
        )
        of_query, of_passage, of_scale = ctx.needs_input_grad[:3]
        with plain_arithmetic(precision, products.device):
            return (
                _product(gradient, passage, batch.query.dtype) if of_query else None,
                _product(gradient.T, query, batch.passage.dtype) if of_passage else None,
                shares.sum() if of_scale else None,
                *[None] * 6,
            )


def _operand(side: Tensor, precision: Precision) -> Tensor:
    return BlockProducts(precision, side.device).operand(side)


def _scores(query: Tensor, passage: Tensor, precision: Precision) -> Tensor:
    """Q Kᵀ [M, N] float32."""
    products = BlockProducts(precision, query.device)
    scores = torch.empty(len(query), len(passage), dtype=torch.float32, device=query.device)
    return products.scores(products.operand(query), products.operand(passage), scores)


def _product(factor: Tensor, block: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · block in `dtype`; sums are float32, and rounded once."""
    if factor.dtype == dtype:
        return factor @ block
    if factor.dtype == torch.float32:
        return (factor @ block).to(dtype)
    return torch.mm(factor, block, out_dtype=torch.float32).to(dtype)
