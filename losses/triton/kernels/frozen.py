"""Helpers of the pass over frozen passages (losses/negatives/triton_frozen.py): checks of blocks, changes of shifts.

Exponentials of a block use the constant shift of the pool's bounds while no frozen passage is longer than they allow,
as in the other kernels; from the first longer passage on they use running maxima, and sums so far are rescaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import scale_and_shift


@triton.jit
def check_block_kernel(passage_ptr, bounds_ptr, rows, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Set bounds[2] to infinity if a row is longer than bounds[1] allows, and bounds[3] to 1 if one is not finite."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    largest = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        values = tl.load(passage_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        squares += tl.sum(values * values, 1)
        largest = tl.maximum(largest, tl.max(tl.where(values == values, tl.abs(values), float("inf")), 1))
    longest = tl.max(tl.where(squares == squares, squares, float("inf")), 0)
    # All programs that write store the same values.
    tl.store(bounds_ptr + 2, float("inf"), mask=longest > tl.load(bounds_ptr + 1))
    tl.store(bounds_ptr + 3, 1.0, mask=tl.max(largest, 0) == float("inf"))


@triton.jit
def rescale_means_kernel(
    bounds_ptr, scale_ptr, before_ptr, shift_ptr, total_ptr, mean_ptr, rows,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rescale sums [rows, D] from the shifts `before` to the present ones, which become `before`.

    A row whose total is zero has no shift: `before` is then minus infinity, and the shift is set to zero, so that
    no infinities are subtracted. With one safe shift, sums have it already.
    """
    _, _, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    before = tl.load(before_ptr + row, mask=valid, other=float("-inf"))
    shift = tl.load(shift_ptr + row, mask=valid, other=0.0)
    empty = tl.load(total_ptr + row, mask=valid, other=0.0) == 0.0
    factor = tl.where(empty, 0.0, tl.exp2(before - tl.where(empty, 0.0, shift)))
    tl.store(before_ptr + row, tl.where(empty, float("-inf"), shift), mask=valid)
    tl.store(shift_ptr + row, tl.where(empty, 0.0, shift), mask=valid)
    columns = tl.where(safe, 0, D)
    for d in range(0, columns, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = valid[:, None] & (column < D)[None, :]
        offset = row.to(tl.int64)[:, None] * D + column[None, :]
        sums = tl.load(mean_ptr + offset, mask=inside, other=0.0)
        tl.store(mean_ptr + offset, tl.where(factor[:, None] > 0, sums * factor[:, None], 0.0), mask=inside)
