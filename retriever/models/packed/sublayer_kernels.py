"""Triton kernels for the end of a BERT sublayer (bias, dropout, residual, LayerNorm), one pass over memory each way:

    Z = R + dropout(H + b),  Y = w ∘ (Z − mean(Z)) / deviation(Z) + v       for each row; H, R [tokens, D]

H is a matrix product without its bias, so the bias and its gradient need no pass of their own. Backward sums the
gradients of b, w and v over the rows of each program. The partial sums are then added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retriever.models.packed.kernels import dropout_mask


@triton.jit
def vector(ptr, columns, D: tl.constexpr):
    """Load [D] as float32; zeros beyond D."""
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_vector(ptr, columns, numbers, D: tl.constexpr):
    """Store into [D]."""
    tl.store(ptr + columns, numbers.to(ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def forward_kernel(
    hidden_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    shift_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    scale_ptr,
    seed_ptr,
    eps,
    dropout,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Compute Y of one row. With KEEP, also store Z, its mean and 1 / deviation, float32 [tokens], for backward."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    total = vector(hidden_ptr + row * D, columns, D) + vector(bias_ptr, columns, D)
    if DROPOUT:
        stream = tl.load(seed_ptr).to(tl.uint32)
        total = tl.where(dropout_mask(row, columns, stream, dropout), total / (1.0 - dropout), 0.0)
    total += vector(residual_ptr + row * D, columns, D)
    # Backward reads Z in the dtype of the output.
    total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.sum(total, 0) / D
    centered = tl.where(columns < D, total - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)
    out = centered * scale * vector(weight_ptr, columns, D) + vector(shift_ptr, columns, D)
    store_vector(out_ptr + row * D, columns, out, D)
    if KEEP:
        store_vector(sum_ptr + row * D, columns, total, D)
        tl.store(mean_ptr + row, mean)
        tl.store(scale_ptr + row, scale)


# See retriever/models/packed/kernels.py for `do_not_specialize`.
@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    out_grad_ptr,
    sum_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    hidden_grad_ptr,
    residual_grad_ptr,
    partial_ptr,
    seed_ptr,
    tokens,
    dropout,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute dR and, with DROPOUT, dH of every programs-th row, and `partial` [programs, 3, D]: db, dw and dv."""
    columns = tl.arange(0, BLOCK_D)
    weight = vector(weight_ptr, columns, D)
    if DROPOUT:
        stream = tl.load(seed_ptr).to(tl.uint32)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    weight_grad = tl.zeros([BLOCK_D], tl.float32)
    shift_grad = tl.zeros([BLOCK_D], tl.float32)
    for number in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(number, tl.int64)
        offset = row * D
        out_grad = vector(out_grad_ptr + offset, columns, D)
        scale = tl.load(scale_ptr + row)
        unit = tl.where(columns < D, (vector(sum_ptr + offset, columns, D) - tl.load(mean_ptr + row)) * scale, 0.0)
        weight_grad += out_grad * unit
        shift_grad += out_grad
        out_grad *= weight
        projection = tl.sum(out_grad * unit, 0) / D
        out_grad = (out_grad - tl.sum(out_grad, 0) / D - unit * projection) * scale
        store_vector(residual_grad_ptr + offset, columns, out_grad, D)
        if DROPOUT:
            out_grad = tl.where(dropout_mask(row, columns, stream, dropout), out_grad / (1.0 - dropout), 0.0)
            store_vector(hidden_grad_ptr + offset, columns, out_grad, D)
        bias_grad += out_grad
    partial_ptr += tl.program_id(0) * 3 * D
    store_vector(partial_ptr, columns, bias_grad, D)
    store_vector(partial_ptr + D, columns, weight_grad, D)
    store_vector(partial_ptr + 2 * D, columns, shift_grad, D)
