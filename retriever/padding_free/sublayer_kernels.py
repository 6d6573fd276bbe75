"""What stands between the matrix products of a BERT-like layer, in one pass over memory each way.

Two ends of a sublayer, each from the product alone, so that the bias and its gradient cost no pass of their own:

    norm:  Z = R + dropout(H + b),  Y = w ∘ (Z − mean(Z)) / deviation(Z) + v       (of each row; H, R [tokens, D])
    gelu:  Y = gelu(H + b)                                                         (by the error function)

Backward sums the gradients of b, w and v over the rows of each program; the few partial sums are added afterwards, in
the same order each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retriever.padding_free.kernels import kept

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def row_tile(ptr, rows, columns, tokens, D: tl.constexpr):
    """float32 [rows, columns] of a contiguous [tokens, D]; zeros beyond."""
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    return tl.load(ptr + places, mask=(rows < tokens)[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_row_tile(ptr, rows, columns, tile, tokens, D: tl.constexpr):
    """Into a contiguous [tokens, D]."""
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(ptr + places, tile.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < D)[None, :])


@triton.jit
def vector(ptr, columns, D: tl.constexpr):
    """float32 [columns] of [D]; zeros beyond."""
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward_kernel(
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
    tokens,
    eps,
    dropout,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Y of ROWS rows; for backward (KEEP) Z, and of each row its mean and what it is scaled by, float32 [tokens]."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    total = row_tile(hidden_ptr, rows, columns, tokens, D) + vector(bias_ptr, columns, D)[None, :]
    if DROPOUT:
        stream = tl.load(seed_ptr).to(tl.uint32)
        total = tl.where(kept(rows[:, None], columns[None, :], stream, dropout), total / (1.0 - dropout), 0.0)
    total += row_tile(residual_ptr, rows, columns, tokens, D)
    # As backward will read it.
    total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.sum(total, 1) / D
    centred = tl.where((columns < D)[None, :], total - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    out = centred * scale[:, None] * vector(weight_ptr, columns, D)[None, :] + vector(shift_ptr, columns, D)[None, :]
    store_row_tile(out_ptr, rows, columns, out, tokens, D)
    if KEEP:
        store_row_tile(sum_ptr, rows, columns, total, tokens, D)
        tl.store(mean_ptr + rows, mean, mask=rows < tokens)
        tl.store(scale_ptr + rows, scale, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
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
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dH and dR of every so many rows, dR alone where nothing is dropped; `partial` [programs, 3, D] of db, dw and dv."""
    columns = tl.arange(0, BLOCK_D)
    weight = vector(weight_ptr, columns, D)
    if DROPOUT:
        stream = tl.load(seed_ptr).to(tl.uint32)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    weight_grad = tl.zeros([BLOCK_D], tl.float32)
    shift_grad = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        out_grad = row_tile(out_grad_ptr, rows, columns, tokens, D)
        mean = tl.load(mean_ptr + rows, mask=rows < tokens, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=0.0)
        unit = (row_tile(sum_ptr, rows, columns, tokens, D) - mean[:, None]) * scale[:, None]
        unit = tl.where((columns < D)[None, :], unit, 0.0)
        weight_grad += tl.sum(out_grad * unit, 0)
        shift_grad += tl.sum(out_grad, 0)
        out_grad *= weight[None, :]
        along = tl.sum(out_grad * unit, 1) / D
        out_grad = (out_grad - (tl.sum(out_grad, 1) / D)[:, None] - unit * along[:, None]) * scale[:, None]
        store_row_tile(residual_grad_ptr, rows, columns, out_grad, tokens, D)
        if DROPOUT:
            stays = kept(rows[:, None], columns[None, :], stream, dropout)
            out_grad = tl.where(stays, out_grad / (1.0 - dropout), 0.0)
            store_row_tile(hidden_grad_ptr, rows, columns, out_grad, tokens, D)
        bias_grad += tl.sum(out_grad, 0)
    partial_ptr += tl.program_id(0) * 3 * D + columns
    tl.store(partial_ptr, bias_grad, mask=columns < D)
    tl.store(partial_ptr + D, weight_grad, mask=columns < D)
    tl.store(partial_ptr + 2 * D, shift_grad, mask=columns < D)


@triton.jit(do_not_specialize=["tokens"])
def gelu_forward_kernel(
    hidden_ptr, bias_ptr, out_ptr, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """Y of ROWS rows and BLOCK_D columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = row_tile(hidden_ptr, rows, columns, tokens, D) + vector(bias_ptr, columns, D)[None, :]
    store_row_tile(out_ptr, rows, columns, 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF)), tokens, D)


@triton.jit(do_not_specialize=["tokens"])
def gelu_backward_kernel(
    out_grad_ptr,
    hidden_ptr,
    bias_ptr,
    hidden_grad_ptr,
    partial_ptr,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dH of every so many rows and BLOCK_D columns, and `partial` [programs, D] of db."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = vector(bias_ptr, columns, D)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        x = row_tile(hidden_ptr, rows, columns, tokens, D) + bias[None, :]
        slope = 0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * tl.exp(-0.5 * x * x) * ROOT_HALF_OVER_PI
        grad = row_tile(out_grad_ptr, rows, columns, tokens, D) * slope
        store_row_tile(hidden_grad_ptr, rows, columns, grad, tokens, D)
        bias_grad += tl.sum(grad, 0)
    tl.store(partial_ptr + tl.program_id(0) * D + columns, bias_grad, mask=columns < D)
