"""Own hard negatives of each query (losses/negatives/own.py): one program per query, forward and backward.

    log_sum_i = log Σ_h exp(scale · q_i · v_h) over the rows v_h of query i
    dv_h = scale · g_i p_h q_i      dq_i = scale · g_i Σ_h p_h v_h      p_h = exp(scale · q_i · v_h − log_sum_i)

Saved for backward: the products q_i · v_h [H] and the log-sum-exps, float32. The rows are read once in each direction,
and no two programs write to the same element, so results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import LOG2_E


@triton.jit
def own_forward_kernel(
    query_ptr, values_ptr, offset_ptr, scale_ptr, product_ptr, log_sum_ptr, rows,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a query's own negatives, and their products; minus infinity for a query without."""
    i = tl.program_id(0)
    scale = tl.load(scale_ptr) * LOG2_E
    column = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + i.to(tl.int64) * D + column, mask=column < D, other=0.0).to(tl.float32)
    first, stop = load_span(offset_ptr, i, rows)
    highest, total = float("-inf"), 0.0
    while first < stop:
        row = first + tl.arange(0, BLOCK_H)
        inside = row < stop
        values = tl.load(
            values_ptr + row[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0
        ).to(tl.float32)
        products = tl.sum(values * query[None, :], 1)
        # A product of minus infinity would add zero to the sum.
        products = tl.where(tl.abs(products) < float("inf"), products, float("nan"))
        tl.store(product_ptr + row, products, mask=inside)
        exponents = tl.where(inside, products * scale, float("-inf"))
        new = tl.maximum(highest, tl.max(exponents, 0))
        total = total * tl.exp2(highest - new) + tl.sum(tl.exp2(exponents - new), 0)
        highest = new
        first += BLOCK_H
    # The maximum ignores NaN, the sum does not.
    log_sum = tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) / LOG2_E)
    tl.store(log_sum_ptr + i, log_sum)


@triton.jit
def own_backward_kernel(
    query_ptr, values_ptr, offset_ptr, scale_ptr, product_ptr, log_sum_ptr, upstream_ptr, query_gradient_ptr,
    values_gradient_ptr, partial_ptr, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of a query and of its own negatives, and its part of the gradient of logit_scale.

    Operands have WIDTH columns, gradients D.
    """
    i = tl.program_id(0)
    scale = tl.load(scale_ptr)
    column = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + i.to(tl.int64) * WIDTH + column, mask=column < D, other=0.0).to(tl.float32)
    first, stop = load_span(offset_ptr, i, rows)
    log_sum, upstream = tl.load(log_sum_ptr + i), tl.load(upstream_ptr + i)
    gradient = tl.zeros((BLOCK_D,), dtype=tl.float32)
    partial = 0.0
    while first < stop:
        row = first + tl.arange(0, BLOCK_H)
        inside = row < stop
        mask = inside[:, None] & (column < D)[None, :]
        products = tl.load(product_ptr + row, mask=inside, other=0.0)
        weights = tl.where(inside, tl.exp2((products * scale - log_sum) * LOG2_E) * upstream, 0.0)
        partial += tl.sum(weights * products, 0)
        weights *= scale
        if OF_QUERY:
            values = tl.load(values_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
            gradient += tl.sum(values.to(tl.float32) * weights[:, None], 0)
        if OF_VALUES:
            of_values = (weights[:, None] * query[None, :]).to(values_gradient_ptr.dtype.element_ty)
            tl.store(values_gradient_ptr + row[:, None] * D + column[None, :], of_values, mask=mask)
        first += BLOCK_H
    tl.store(partial_ptr + i, partial)
    if OF_QUERY:
        target = query_gradient_ptr + i.to(tl.int64) * D + column
        tl.store(target, gradient.to(query_gradient_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def load_span(offset_ptr, i, rows):
    """First and last row of query i, inside the values even if the offsets are invalid."""
    first = tl.minimum(tl.maximum(tl.load(offset_ptr + i), 0), rows)
    return first, tl.minimum(tl.load(offset_ptr + i + 1), rows)
