"""InfoNCE of small batches on a GPU: the whole score matrix, with few kernel launches.

For a few thousand pairs or fewer, launches dominate the time. Forward is one product and two kernels; backward is one
kernel and two products (triton/kernels/dense.py).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch
from losses.options import Statistics
from losses.precision import BlockProducts, Precision, matmul_precision

# Products Q Kᵀ, stored until backward, and dS.
BYTES_PER_SCORE = 8
LOSS_BLOCK = 1024


def fits_dense(batch: ContrastiveBatch, workspace_bytes: int) -> bool:
    """Whether the whole matrix fits in the workspace."""
    return batch.query.shape[0] * batch.passage.shape[0] * BYTES_PER_SCORE <= workspace_bytes


def dense_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """0-dim InfoNCE loss of the batch, differentiable once with respect to query, passage and logit_scale."""
    return _DenseLoss.apply(batch.query, batch.passage, batch.logit_scale, batch, precision)


def dense_loss_and_statistics(batch: ContrastiveBatch, precision: Precision) -> tuple[Tensor, Statistics]:
    """`dense_loss` and statistics of the rows."""
    # Not outputs of the function: for each of those autograd does work on the host, which is what limits the speed.
    found: list[Statistics] = []
    loss = _DenseLoss.apply(batch.query, batch.passage, batch.logit_scale, batch, precision, found)
    return loss, found[0]


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        batch: ContrastiveBatch,
        precision: Precision,
        found: list[Statistics] | None = None,
    ) -> Tensor:
        kernels = _kernels()
        rows, columns = query.shape[0], passage.shape[0]
        with matmul_precision(precision, query.device):
            products = BlockProducts(precision, query.device)
            operands = products.operand(query), products.operand(passage)
            scores = products.scores(*operands, query.new_empty(rows, columns, dtype=torch.float32))
        if batch.excluded is not None:
            pairs = batch.excluded
            kernels.mark_excluded_kernel[(-(-len(pairs) // kernels.MARK_BLOCK),)](
                scores,
                pairs,
                batch.given_positive,
                len(pairs),
                rows,
                columns,
                DIAGONAL=batch.given_positive is None,
                BLOCK=kernels.MARK_BLOCK,
            )
        statistics = scores.new_empty(2 * (rows + columns))
        programs = -(-rows // kernels.ROWS_PER_PROGRAM)
        if batch.symmetric:
            programs = max(programs, -(-columns // kernels.COLUMNS_PER_PROGRAM))
        kernels.softmax_statistics_kernel[(programs, 2 if batch.symmetric else 1)](
            scores,
            logit_scale,
            batch.given_positive,
            batch.query_ids,
            batch.passage_ids,
            statistics,
            rows,
            columns,
            DIAGONAL=batch.diagonal,
            HAS_IDS=batch.query_ids is not None,
            HAS_EXCLUDED=batch.excluded is not None,
            ROWS_PER_PROGRAM=kernels.ROWS_PER_PROGRAM,
            ROW_STEP=kernels.ROW_STEP,
            COLUMNS_PER_PROGRAM=kernels.COLUMNS_PER_PROGRAM,
            COLUMN_STEP=kernels.COLUMN_STEP,
        )
        loss = scores.new_empty(())
        counts = summary = None
        if found is not None:
            counts, numbers = _row_statistics(batch, scores, statistics)
            summary = scores.new_empty(3)
            found.append(_as_statistics(counts, numbers, summary))
        kernels.mean_loss_kernel[(1,)](
            scores,
            logit_scale,
            batch.given_positive,
            statistics,
            counts,
            loss,
            summary,
            rows,
            columns,
            SYMMETRIC=batch.symmetric,
            DIAGONAL=batch.diagonal,
            HAS_COUNTS=counts is not None,
            BLOCK=LOSS_BLOCK,
        )
        ctx.save_for_backward(
            *operands, logit_scale, batch.given_positive, batch.query_ids, batch.passage_ids, scores, statistics
        )
        ctx.options = batch.symmetric, batch.diagonal, batch.excluded is not None, precision, query.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("the dense loss is differentiable once: implementation='full' has second derivatives")
        kernels = _kernels()
        query, passage, logit_scale, given_positive, query_ids, passage_ids, scores, statistics = ctx.saved_tensors
        symmetric, diagonal, has_excluded, precision, dtype = ctx.options
        rows, columns = scores.shape
        positive_count = None
        if symmetric and not diagonal:
            # An out-of-range positive has already made the loss NaN.
            own = given_positive.clamp(0, columns - 1)
            positive_count = statistics.new_zeros(columns).index_add_(0, own, statistics.new_ones(rows))
        grid = -(-rows // kernels.TILE_M), -(-columns // kernels.TILE_N)
        partials = statistics.new_empty(grid)
        gradient = query.new_empty(rows, columns)
        kernels.dense_gradient_kernel[grid](
            scores,
            logit_scale,
            upstream,
            given_positive,
            positive_count,
            query_ids,
            passage_ids,
            statistics,
            gradient,
            partials,
            rows,
            columns,
            SYMMETRIC=symmetric,
            DIAGONAL=diagonal,
            HAS_IDS=query_ids is not None,
            HAS_EXCLUDED=has_excluded,
            TILE_M=kernels.TILE_M,
            TILE_N=kernels.TILE_N,
        )
        of_query, of_passage, of_scale = ctx.needs_input_grad[:3]
        with matmul_precision(precision, scores.device):
            return (
                _product(gradient, passage, dtype) if of_query else None,
                _product(gradient.T, query, dtype) if of_passage else None,
                partials.sum() if of_scale else None,
                None,
                None,
                None,
            )


def _row_statistics(batch: ContrastiveBatch, scores: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[3, M] int64 and [2, M]: what the kernel counts, from the products [M, N] and the sums of their rows."""
    kernels = _kernels()
    rows, columns = scores.shape
    counts, numbers = scores.new_empty(3, rows, dtype=torch.int64), scores.new_empty(2, rows)
    kernels.dense_row_statistics_kernel[(-(-rows // kernels.ROWS_PER_PROGRAM),)](
        scores,
        batch.logit_scale,
        batch.given_positive,
        batch.query_ids,
        batch.passage_ids,
        statistics,
        counts,
        numbers,
        rows,
        columns,
        DIAGONAL=batch.diagonal,
        HAS_IDS=batch.query_ids is not None,
        HAS_EXCLUDED=batch.excluded is not None,
        ROWS_PER_PROGRAM=kernels.ROWS_PER_PROGRAM,
        ROW_STEP=kernels.ROW_STEP,
    )
    return counts, numbers


def _as_statistics(counts: Tensor, numbers: Tensor, summary: Tensor) -> Statistics:
    rank, hardest, masked = counts.unbind()
    hardest_score, entropy = numbers.unbind()
    accuracy, mrr, masked_share = summary.unbind()
    return Statistics(rank, hardest, hardest_score, entropy, masked, accuracy, mrr, masked_share)


@functools.cache
def _kernels() -> ModuleType:
    """The kernels' module; Triton is imported on first use."""
    from losses.triton.kernels import dense

    return dense


def _product(factor: Tensor, block: Tensor, dtype: torch.dtype) -> Tensor:
    """factor @ block in `dtype`, accumulated in float32 and rounded once."""
    if factor.dtype == dtype:
        return factor @ block
    if factor.dtype == torch.float32:
        return (factor @ block).to(dtype)
    return torch.mm(factor, block, out_dtype=torch.float32).to(dtype)
