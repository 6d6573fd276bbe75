"""InfoNCE by Triton kernels on one GPU: forward and backward over blocks of scores, and their custom operators.

Forward computes each tile of S once (triton/kernels/statistics.py). Backward writes dS, one block at a time and in the
operand dtype, to the workspace or over the exponentials kept by forward (triton/kernels/gradients.py). cuBLAS
multiplies the block and accumulates into float32 sums for dQ and dK. Nothing synchronizes with the device: the device
decides which arithmetic is safe (triton/kernels/tile.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch
from losses.precision import Precision, add_product, matmul_precision
from losses.torch_tiles.row_terms import column_counts
from losses.triton.block_launches import (
    SavedStatistics,
    ScoreGradientWeights,
    add_sums,
    merged_loss,
    score_gradient,
)
from losses.triton.kernel_batch import (
    GradientEpilogue,
    KernelBatch,
    choose_ds_scale,
    compact_ids_if_given,
    round_up_to_16_bytes,
    sorted_excluded,
    span_length,
)


def fused_loss(batch: ContrastiveBatch, precision: Precision, workspace_bytes: int) -> Tensor:
    """0-dim InfoNCE loss of the batch, differentiable once with respect to query, passage and logit_scale.

    In addition to inputs and gradients it uses `workspace_bytes` (at least 32 KiB), vectors of M and N numbers, copies
    of the embeddings if their precision or alignment requires it, and float32 accumulators of half-precision
    gradients: of one block of queries, and of all passages. If `workspace_bytes` exceeds what blocks of dS can use,
    bf16 forward keeps exponentials in it. Backward overwrites them; a second backward recomputes them.
    """
    leaves = (batch.query, batch.passage, batch.logit_scale, batch.further)
    ids = compact_ids_if_given(batch.query_ids, batch.passage_ids)
    fixed = (batch.positive, *ids, batch.excluded, batch.symmetric, batch.diagonal)
    # Keep exponentials only if backward can run.
    differentiable = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    return _FusedLoss.apply(*leaves, batch.single_partition, *fixed, precision, workspace_bytes, differentiable)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, passage: Tensor, logit_scale: Tensor, further: Tensor | None, single_partition: bool,
        *fixed: Any
    ) -> Tensor:  # fmt: skip
        positive, query_ids, passage_ids, _, *options, _ = fixed
        arguments = (query, passage, logit_scale, *fixed)
        # A custom operator costs more than the kernels of a small batch, so it is used under torch.compile only.
        if torch.compiler.is_compiling():
            # Nothing is kept, because a compiled graph may run backward twice on what it saved.
            loss, flat_statistics, keys, starts = inf_cl_forward_op(*arguments[:-1])
            kept = flat_statistics.new_empty(0, dtype=query.dtype)
        else:
            loss, flat_statistics, keys, starts, kept = inf_cl_forward(*arguments)
        ctx.shares = None
        if further is not None:
            statistics = SavedStatistics.split(flat_statistics, query.shape[0], passage.shape[0])
            loss, ctx.shares = merged_loss(statistics, loss, positive, further, single_partition, symmetric=options[0])
        masks = (query_ids, passage_ids, keys, starts)
        ctx.save_for_backward(query, passage, logit_scale, positive, *masks, flat_statistics, kept)
        ctx.options = options
        ctx.kept_overwritten = False
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss is differentiable once: implementation='full' has second derivatives")
        *inputs, flat_statistics, kept = ctx.saved_tensors
        kept = kept[:0] if ctx.kept_overwritten else kept
        ctx.kept_overwritten = True
        wanted = list(ctx.needs_input_grad[:3])
        compute: Callable[..., Any] = inf_cl_backward_op if torch.compiler.is_compiling() else inf_cl_backward
        row_factor = positive_count = of_further = None
        if ctx.shares is not None:
            symmetric, positive = ctx.options[0], inputs[3]
            row_factor = ctx.shares.row_factor(symmetric)
            of_further = ctx.shares.further_gradient(symmetric) * (upstream / len(positive))
            if ctx.shares.column is not None:
                positive_count = column_counts(positive, ctx.shares.column, len(inputs[1]))
        factors = (row_factor, positive_count)
        gradients = compute(*inputs, *ctx.options, flat_statistics, kept, upstream, *wanted, *factors)
        found = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
        return (*found, of_further, *[None] * 10)


def inf_cl_forward(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    symmetric: bool,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, sorted excluded pairs, start of each cell, kept exponentials) of a batch."""
    import triton

    from losses.triton.kernels.bounds import measure_bounds
    from losses.triton.kernels.statistics import loss_kernel

    kernel_batch = KernelBatch(query, passage, query_ids, passage_ids, precision, workspace_bytes, keep)
    queries, passages = query.shape[0], passage.shape[0]
    flat_statistics = torch.zeros(SavedStatistics.numel(queries, passages), device=query.device)
    statistics = SavedStatistics.split(flat_statistics, queries, passages)
    kept = kernel_batch.query.new_empty(
        kernel_batch.blocks.kept_rows, round_up_to_16_bytes(passages, kernel_batch.dtype)
    )
    measure_bounds(kernel_batch.query, kernel_batch.passage, positive, logit_scale, statistics.bounds)
    checks = {"positive": positive, "diagonal": diagonal, "bounds": statistics.bounds}
    keys, starts = sorted_excluded(excluded, query, passage, **checks)
    kernel_batch.set_excluded(keys, starts)

    add_sums(kernel_batch, statistics, logit_scale, positive, symmetric, diagonal, workspace_bytes, kept)
    block = 1024 if query.is_cuda else 64
    partials = flat_statistics.new_empty(triton.cdiv(queries, block))
    loss_kernel[(len(partials),)](
        statistics.bounds,
        positive,
        statistics.score,
        statistics.row_sum,
        statistics.row_shift,
        statistics.column_sum,
        statistics.column_shift,
        partials,
        queries,
        SYMMETRIC=symmetric,
        DIAGONAL=diagonal,
        BLOCK=block,
    )
    return partials.sum(), flat_statistics, keys, starts, kept


@torch.library.custom_op("dense_retriever::inf_cl_forward", mutates_args=())
def inf_cl_forward_op(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    symmetric: bool,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`inf_cl_forward` without kept exponentials, as a custom operator."""
    fixed = (positive, query_ids, passage_ids, excluded, symmetric, diagonal, precision, workspace_bytes)
    *found, _ = inf_cl_forward(query, passage, logit_scale, *fixed, keep=False)
    loss, flat_statistics, keys, starts = found
    return loss, flat_statistics, keys, starts


@inf_cl_forward_op.register_fake
def _(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from losses.triton.kernels.excluded import Cells

    queries, passages = query.shape[0], passage.shape[0]
    flat_statistics = query.new_empty(SavedStatistics.numel(queries, passages), dtype=torch.float32)
    keys, starts = query.new_empty(0, dtype=torch.int64), query.new_empty(0, dtype=torch.int32)
    if excluded is not None:
        cells = Cells.of(queries, passages)
        keys, starts = (
            excluded.new_empty(len(excluded)),
            starts.new_empty(cells.row_cells * cells.column_cells + 1),
        )
    return flat_statistics.new_empty(()), flat_statistics, keys, starts


def inf_cl_backward(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    keys: Tensor,
    starts: Tensor,
    symmetric: bool,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
    flat_statistics: Tensor,
    kept: Tensor,
    upstream: Tensor,
    want_query: bool,
    want_passage: bool,
    want_scale: bool,
    row_factor: Tensor | None = None,
    weighted_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, passage and logit_scale; empty tensors if not wanted. Overwrites `kept`.

    `row_factor` [M] is a factor of the weights of rows, and `weighted_count` [N] takes the place of the number of
    queries whose positive each passage is (losses/torch_tiles/row_terms.py).
    """
    import triton

    from losses.triton.block_sizes import gradient_blocks
    from losses.triton.kernels.gradients import gradient_weights_kernel

    keep = kept.shape[0] > 0
    kernel_batch = KernelBatch(query, passage, query_ids, passage_ids, precision, workspace_bytes, keep)
    kernel_batch.set_excluded(keys, starts)
    queries, passages = query.shape[0], passage.shape[0]
    statistics = SavedStatistics.split(flat_statistics, queries, passages)
    positive_count = None
    if symmetric and not diagonal:
        # An out-of-range positive has already made the loss NaN.
        own = positive.clamp(0, passages - 1)
        positive_count = flat_statistics.new_zeros(passages).index_add_(0, own, flat_statistics.new_ones(queries))
    ds_scale = choose_ds_scale(kernel_batch.dtype, positive_count, flat_statistics)
    if weighted_count is not None:
        positive_count = weighted_count
    row_weight, column_weight = torch.empty_like(statistics.row_sum), torch.empty_like(statistics.column_sum)
    gradient_weights_kernel[(triton.cdiv(max(queries, passages), 1024),)](
        ds_scale,
        ds_scale if positive_count is None else positive_count,
        statistics.row_sum,
        statistics.column_sum,
        row_weight,
        column_weight,
        queries,
        passages,
        SYMMETRIC=symmetric,
        DIAGONAL=diagonal and weighted_count is None,
        BLOCK=1024,
    )
    if row_factor is not None:
        row_weight *= row_factor

    weights = ScoreGradientWeights(ds_scale, row_weight, column_weight, symmetric, diagonal)
    blocks = list(gradient_blocks(queries, passages, kernel_batch.blocks))
    recomputed = min(kernel_batch.blocks.rows, queries - kernel_batch.blocks.kept_rows)
    workspace = kernel_batch.query.new_empty(
        recomputed * round_up_to_16_bytes(kernel_batch.blocks.columns, kernel_batch.dtype)
    )
    epilogue = GradientEpilogue(kernel_batch.width, logit_scale, ds_scale, upstream, queries)
    query_gradient = _gradient_of(query, want_query)
    need_query = want_query or want_scale
    query_sum = flat_statistics.new_empty(
        max(span_length(rows) for rows, _, _ in blocks) if need_query else 0, kernel_batch.width
    )
    passage_sum = flat_statistics.new_empty(passages if want_passage else 0, kernel_batch.width)
    partials: list[Tensor] = []
    with matmul_precision(cast(Precision, precision), query.device):
        for rows, all_columns, keeping in blocks:
            height = span_length(rows)
            block_sum = query_sum[:height]
            for columns in all_columns:
                if keeping:
                    gradient = exponentials = kept[rows, columns]
                else:
                    stride = round_up_to_16_bytes(span_length(columns), kernel_batch.dtype)
                    gradient = workspace[: height * stride].view(height, stride)[:, : span_length(columns)]
                    exponentials = None
                score_gradient(
                    kernel_batch, statistics, weights, logit_scale, positive, rows, columns, gradient, exponentials
                )
                if need_query:
                    add_product(block_sum, gradient, kernel_batch.passage[columns], first=columns.start == 0)
                if want_passage:
                    add_product(passage_sum[columns], gradient.T, kernel_batch.query[rows], first=rows.start == 0)
            if need_query:
                out = query_gradient[rows] if want_query else block_sum
                partials.append(epilogue(block_sum, kernel_batch.query[rows], out, want_scale))
        del query_sum, workspace
        passage_gradient = passage_sum
        if want_passage and (passage.dtype != torch.float32 or kernel_batch.width != passage.shape[1]):
            passage_gradient = _gradient_of(passage, True)
        if want_passage:
            epilogue(passage_sum, passage_sum, passage_gradient, False)
        scale_gradient = torch.cat(partials).sum() if want_scale else flat_statistics.new_empty(0)
    return query_gradient, passage_gradient, scale_gradient


inf_cl_backward_op = torch.library.custom_op("dense_retriever::inf_cl_backward", inf_cl_backward, mutates_args=())


@inf_cl_backward_op.register_fake
def _(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    keys: Tensor,
    starts: Tensor,
    symmetric: bool,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
    flat_statistics: Tensor,
    kept: Tensor,
    upstream: Tensor,
    want_query: bool,
    want_passage: bool,
    want_scale: bool,
    row_factor: Tensor | None = None,
    weighted_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = flat_statistics.new_empty(()) if want_scale else flat_statistics.new_empty(0)
    return _gradient_of(query, want_query), _gradient_of(passage, want_passage), scale


def _gradient_of(embeddings: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format) if wanted else embeddings.new_empty(0)
