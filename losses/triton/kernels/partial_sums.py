"""Sums of rows and columns over several blocks and ranks: what an exchange does with them between visits of tiles.

Shifts are exponents of 2. A table of columns [4, n] has their shifts, sums of exponentials, how many queries own each
as their positive, and the sum of those queries' scores with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.statistics import negative_log_probability


@triton.jit
def merge_columns_kernel(one_ptr, other_ptr, columns, BLOCK: tl.constexpr):
    """Add another table of the same columns, over other queries, to one."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < columns
    shift = tl.load(one_ptr + index, mask=valid, other=0.0)
    other_shift = tl.load(other_ptr + index, mask=valid, other=0.0)
    highest = tl.maximum(shift, other_shift)
    # A column that everybody masks has no maximum, and must not become the difference of two infinities.
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
    """Bring sums under the shifts that the table has now, which are none below those `before`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < columns
    shift = tl.load(table_ptr + index, mask=valid, other=0.0)
    before = tl.load(before_ptr + index, mask=valid, other=0.0)
    total = tl.load(table_ptr + columns + index, mask=valid, other=0.0)
    # Where nobody has a maximum the sum is zero.
    lowered = tl.where(shift == float("-inf"), 0.0, total * tl.exp2(before - shift))
    tl.store(table_ptr + columns + index, lowered, mask=valid)


@triton.jit
def partial_loss_kernel(
    bounds_ptr, row_shift_ptr, row_sum_ptr, score_ptr, table_ptr, table_stride, partial_ptr, rows, columns,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program's part of the sum of row losses; with SYMMETRIC, of half of it and half of the column losses."""
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
        of_column = negative_log_probability(mean_score, table_ptr + table_stride, table_ptr, index, is_positive)
        loss = (loss + tl.where(is_positive, positive_count * of_column, 0.0)) * 0.5
    # A negative of minus infinity everywhere would vanish from the sums, so finiteness is asked of the inputs.
    invalid = tl.load(bounds_ptr + 3) > 0
    tl.store(partial_ptr + tl.program_id(0), tl.where(invalid, float("nan"), tl.sum(loss, 0)))
