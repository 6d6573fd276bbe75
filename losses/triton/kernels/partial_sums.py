"""Operations on partial softmax sums of rows and columns that are computed in several blocks or on several ranks.

Shifts are exponents of 2. A table of columns [4, n] has the shifts, the sums of exponentials, the number of queries
whose positive each passage is, and the sum of the scores of those queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.statistics import negative_log_probability


@triton.jit
def merge_columns_kernel(one_ptr, other_ptr, columns, BLOCK: tl.constexpr):
    """Add the table `other` to the table `one`: the same columns, over other queries."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < columns
    shift = tl.load(one_ptr + index, mask=valid, other=0.0)
    other_shift = tl.load(other_ptr + index, mask=valid, other=0.0)
    highest = tl.maximum(shift, other_shift)
    # A fully masked column has maximum minus infinity; avoid subtracting infinities.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    offset = index + columns
    total = tl.load(one_ptr + offset, mask=valid, other=0.0) * tl.exp2(shift - base)
    total += tl.load(other_ptr + offset, mask=valid, other=0.0) * tl.exp2(other_shift - base)
    tl.store(one_ptr + index, highest, mask=valid)
    tl.store(one_ptr + offset, total, mask=valid)
    for _ in range(2):
        offset += columns
        added = tl.load(one_ptr + offset, mask=valid, other=0.0) + tl.load(other_ptr + offset, mask=valid, other=0.0)
        tl.store(one_ptr + offset, added, mask=valid)


@triton.jit
def rescale_columns_kernel(table_ptr, before_ptr, columns, BLOCK: tl.constexpr):
    """Rescale sums from the shifts `before` to the table's present shifts, which are not smaller."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < columns
    shift = tl.load(table_ptr + index, mask=valid, other=0.0)
    before = tl.load(before_ptr + index, mask=valid, other=0.0)
    total = tl.load(table_ptr + columns + index, mask=valid, other=0.0)
    # The sum of a fully masked column is zero.
    rescaled = tl.where(shift == float("-inf"), 0.0, total * tl.exp2(before - shift))
    tl.store(table_ptr + columns + index, rescaled, mask=valid)


@triton.jit
def partial_loss_kernel(
    bounds_ptr, row_shift_ptr, row_sum_ptr, score_ptr, table_ptr, table_stride, partial_ptr, rows, columns,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program's partial sum of row losses; if SYMMETRIC, half the partial sums of row and column losses."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < rows
    score = tl.load(score_ptr + index, mask=valid, other=0.0)
    loss = tl.where(valid, negative_log_probability(score, row_sum_ptr, row_shift_ptr, index, valid), 0.0)
    if SYMMETRIC:
        inside = index < columns
        positive_count = tl.load(table_ptr + 2 * table_stride + index, mask=inside, other=0.0)
        is_positive = inside & (positive_count > 0)
        scores = tl.load(table_ptr + 3 * table_stride + index, mask=is_positive, other=0.0)
        mean_score = scores / tl.where(is_positive, positive_count, 1.0)
        column_loss = negative_log_probability(mean_score, table_ptr + table_stride, table_ptr, index, is_positive)
        loss = (loss + tl.where(is_positive, positive_count * column_loss, 0.0)) * 0.5
    # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
    invalid = tl.load(bounds_ptr + 3) > 0
    tl.store(partial_ptr + tl.program_id(0), tl.where(invalid, float("nan"), tl.sum(loss, 0)))
