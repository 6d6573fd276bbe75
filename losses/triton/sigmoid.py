"""Sigmoid loss by a Triton kernel on one GPU: value and gradients in one pass over blocks of scores, three products.

The kernel writes dS, one block at a time and in the operand dtype, to the workspace (triton/kernels/sigmoid.py).
cuBLAS multiplies the block and accumulates into float32 sums for dQ and dK. Nothing synchronizes with the device. Sums
have a fixed order, so results are deterministic.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch
from losses.precision import Precision, add_product, matmul_precision
from losses.torch_tiles.sigmoid import saved_gradient_dtype, scale_by_upstream
from losses.triton.kernel_batch import (
    GradientEpilogue,
    KernelBatch,
    compact_ids_if_given,
    round_up_to_16_bytes,
    sorted_excluded,
    span_length,
)


def fused_sigmoid_loss(
    batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision, workspace_bytes: int
) -> Tensor:
    """0-dim sigmoid loss of the batch, differentiable once with respect to query, passage, logit_scale and logit_bias.

    In addition to inputs and two gradients stored until backward it uses `workspace_bytes` (at least 32 KiB), copies
    of the embeddings if their precision or alignment requires it, and float32 accumulators of half-precision
    gradients: of one block of queries, and of all passages.
    """
    leaves = (batch.query, batch.passage, batch.logit_scale, logit_bias)
    wanted = [torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]
    masks = (batch.positive, batch.query_ids, batch.passage_ids, batch.excluded, batch.diagonal)
    fixed = (*masks, precision, workspace_bytes, wanted, False, 0)
    if not any(wanted):
        return _sigmoid_values_call()(*leaves, *fixed)[0]
    return _FusedSigmoidLoss.apply(*leaves, *fixed)


class _FusedSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, *gradients = _sigmoid_values_call()(*arguments)
        *_, ctx.wanted, _, _ = arguments
        ctx.dtypes = tuple(leaf.dtype for leaf in arguments[:4])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        held = tuple(each if want else None for each, want in zip(ctx.saved_tensors, ctx.wanted, strict=True))
        return (*scale_by_upstream(held, upstream, ctx.dtypes), *[None] * 10)


def _sigmoid_values_call() -> Any:
    # A custom operator costs over half a millisecond per call, so it is used under torch.compile only.
    """`sigmoid_values`, or its custom operator under torch.compile."""
    return sigmoid_values_op if torch.compiler.is_compiling() else sigmoid_values


def sigmoid_values(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
    wanted: list[bool],
    is_block: bool,
    first_passage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients for an upstream gradient of 1.

    The gradients are those of query, passage, logit_scale and logit_bias; empty tensors if not `wanted`. With
    `is_block`, the passages are one block of a pool. A positive outside them belongs to another block. `excluded`,
    already checked, then holds rows of the pool, in which the block begins at `first_passage`.
    """
    from losses.triton.block_sizes import spans
    from losses.triton.kernels.bounds import measure_bounds
    from losses.triton.kernels.sigmoid import sigmoid_kernel

    want_query, want_passage, want_scale, want_bias = wanted
    need_query = want_query or want_scale
    kernel_batch = KernelBatch(
        query, passage, *compact_ids_if_given(query_ids, passage_ids), precision, workspace_bytes, False
    )
    queries, passages = query.shape[0], passage.shape[0]
    bounds = torch.zeros(4, device=query.device)
    # Here the bounds only tell whether the positives are in range.
    block_positive = positive.clamp(0, passages - 1) if is_block else positive
    measure_bounds(kernel_batch.query, kernel_batch.passage, block_positive, logit_scale, bounds)
    checks: dict[str, Any] = {"positive": positive, "diagonal": diagonal, "bounds": bounds}
    options = {"first": first_passage} if is_block else checks
    kernel_batch.set_excluded(*sorted_excluded(excluded, query, passage, **options))

    shape, blocks = kernel_batch.shape("sigmoid"), kernel_batch.blocks
    most_tiles = sum(_tiles(shape, blocks.rows, columns) for columns in spans(0, passages, blocks.columns))
    tile_sums = bounds.new_empty(most_tiles, 2)
    # float64, because a sum has many small terms.
    row_sums = bounds.new_empty(-(-queries // blocks.rows), 2, dtype=torch.float64)
    # |M · dS| is at most 1 and mostly below the smallest float16 value. 2^15 is the largest power of two in float16.
    ds_scale = 2.0**15 if kernel_batch.dtype == torch.float16 else 1.0
    epilogue = GradientEpilogue(
        kernel_batch.width, logit_scale, bounds.new_full((), ds_scale), bounds.new_ones(()), queries
    )
    workspace = kernel_batch.query.new_empty(
        blocks.rows * round_up_to_16_bytes(blocks.columns, kernel_batch.dtype) if any(wanted) else 0
    )
    query_gradient, passage_gradient = _empty_gradient(query, want_query), _empty_gradient(passage, want_passage)
    query_sum = bounds.new_empty(blocks.rows if need_query else 0, kernel_batch.width)
    in_place = want_passage and passage_gradient.dtype == torch.float32 and kernel_batch.width == passage.shape[1]
    passage_sum = (
        passage_gradient if in_place else bounds.new_empty(passages if want_passage else 0, kernel_batch.width)
    )
    partials: list[Tensor] = []
    with matmul_precision(cast(Precision, precision), query.device):
        for i, rows in enumerate(spans(0, queries, blocks.rows)):
            height = span_length(rows)
            block_sum, done = query_sum[:height], 0
            for j, columns in enumerate(spans(0, passages, blocks.columns)):
                width = span_length(columns)
                stride = round_up_to_16_bytes(width, kernel_batch.dtype)
                gradient = (
                    workspace[: height * stride].view(height, stride)[:, :width] if any(wanted) else kernel_batch.query
                )
                sigmoid_kernel[shape.grid(height, width, kernel_batch.processors)](
                    kernel_batch.descriptor(kernel_batch.query[rows], shape.block_m, shape.block_k),
                    kernel_batch.descriptor(kernel_batch.passage[columns], shape.block_n, shape.block_k),
                    kernel_batch.descriptor(gradient, shape.block_m, shape.block_n if any(wanted) else shape.block_k),
                    logit_scale,
                    logit_bias,
                    positive,
                    kernel_batch.query_ids,
                    kernel_batch.passage_ids,
                    tile_sums[done:],
                    *kernel_batch.excluded_arguments,
                    height,
                    width,
                    rows.start,
                    columns.start,
                    D=kernel_batch.width,
                    PRODUCT=kernel_batch.product,
                    DIAGONAL=diagonal,
                    HAS_IDS=kernel_batch.has_ids,
                    HAS_EXCLUDED=kernel_batch.has_excluded,
                    GRADIENT=any(wanted),
                    DS_SCALE=ds_scale,
                    **shape.meta(),
                )
                done += _tiles(shape, height, columns)
                if need_query:
                    add_product(block_sum, gradient, kernel_batch.passage[columns], first=j == 0)
                if want_passage:
                    add_product(passage_sum[columns], gradient.T, kernel_batch.query[rows], first=i == 0)
            torch.sum(tile_sums[:done], 0, dtype=torch.float64, out=row_sums[i])
            if need_query:
                out = query_gradient[rows] if want_query else block_sum
                partials.append(epilogue(block_sum, kernel_batch.query[rows], out, want_scale))
        if want_passage:
            epilogue(passage_sum, passage_sum, passage_gradient, False)
    loss, bias_gradient = row_sums.sum(0) / queries
    # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
    loss = torch.where(bounds[3] > 0, torch.nan, (loss * math.log(2)).float())
    scale_gradient = torch.cat(partials).sum(dtype=torch.float64).float() if want_scale else bounds.new_empty(0)
    bias_gradient = bias_gradient.float() if want_bias else bounds.new_empty(0)
    return loss, query_gradient, passage_gradient, scale_gradient, bias_gradient


sigmoid_values_op = torch.library.custom_op("dense_retriever::sigmoid_loss", sigmoid_values, mutates_args=())


@sigmoid_values_op.register_fake
def _(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positive: Tensor,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    diagonal: bool,
    precision: str,
    workspace_bytes: int,
    wanted: list[bool],
    is_block: bool,
    first_passage: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = query.new_empty((), dtype=torch.float32)
    scale_gradient, bias_gradient = (number.new_empty(() if want else 0) for want in wanted[2:])
    return number, _empty_gradient(query, wanted[0]), _empty_gradient(passage, wanted[1]), scale_gradient, bias_gradient


def _tiles(shape: Any, height: int, columns: slice) -> int:
    """Number of tiles of a block."""
    return -(-height // shape.block_m) * -(-span_length(columns) // shape.block_n)


def _empty_gradient(embeddings: Tensor, wanted: bool) -> Tensor:
    """An uninitialized gradient that is stored until backward; empty if not wanted."""
    return embeddings.new_empty(embeddings.shape if wanted else 0, dtype=saved_gradient_dtype(embeddings.dtype))
