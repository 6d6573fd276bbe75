"""Statistics of the negatives in each row of a tile, and their sum over tiles.

A tile writes four numbers per row, each [tiles, rows] of 32 bits: the number of negatives plus the number of those
above the positive, in 16 bits each; the largest exponent; its column; and Σ 2^(x − s) · (x − s) over the exponents x,
where s is the shift of the tile's sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import scale_and_shift

FIELDS = 4


@triton.jit
def store_negatives(exponents, own_exponent, column_index, statistic_ptr, size, offset, valid):
    """Store counts, the largest exponent and its column, from exponents that are minus infinity if no negative."""
    negative = exponents > float("-inf")
    counts = tl.where(negative, tl.where(exponents > own_exponent[:, None], 65537, 65536), 0)
    tl.store(statistic_ptr + offset, tl.sum(counts, 1).to(tl.float32, bitcast=True), mask=valid)
    highest = tl.max(exponents, 1)
    at_highest = tl.where(exponents == highest[:, None], column_index[None, :], 2147483647)
    tl.store(statistic_ptr + size + offset, highest, mask=valid)
    tl.store(statistic_ptr + 2 * size + offset, tl.min(at_highest, 1).to(tl.float32, bitcast=True), mask=valid)


@triton.jit
def store_weighted_exponents(shifted, exponentials, statistic_ptr, size, offset, valid):
    """Store Σ 2^y · y of the shifted exponents y."""
    # A masked exponent is minus infinity, and zero times it would be NaN.
    weighted = exponentials * tl.maximum(shifted, -3.0e38)
    tl.store(statistic_ptr + 3 * size + offset, tl.sum(weighted, 1), mask=valid)


@triton.jit
def merge_statistics_kernel(
    bounds_ptr, scale_ptr, row_total_ptr, row_shift_ptr, tile_sum_ptr, tile_max_ptr, statistic_ptr, size,
    higher_ptr, counted_ptr, hardest_ptr, hardest_exponent_ptr, weighted_ptr, rows, tiles, first_column,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add the tiles of a block to the statistics of its rows; before its sums are added to the totals.

    `first_column` is the row of the pool at which the block begins.
    """
    _, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < rows
    total = tl.load(row_total_ptr + index, mask=valid, other=0.0)
    before = tl.load(row_shift_ptr + index, mask=valid, other=0.0)
    before = tl.zeros_like(before) + shift if safe else tl.where(total == 0.0, float("-inf"), before)
    higher = tl.load(higher_ptr + index, mask=valid, other=0)
    counted = tl.load(counted_ptr + index, mask=valid, other=0)
    hardest = tl.load(hardest_ptr + index, mask=valid, other=-1)
    best = tl.load(hardest_exponent_ptr + index, mask=valid, other=float("-inf"))
    weighted = tl.load(weighted_ptr + index, mask=valid, other=0.0)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        offset = tile.to(tl.int64)[:, None] * rows + index[None, :]
        inside = (tile < tiles)[:, None] & valid[None, :]
        counts = tl.load(statistic_ptr + offset, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        higher += tl.sum((counts & 65535).to(tl.int64), 0)
        counted += tl.sum((counts >> 16).to(tl.int64), 0)
        maxima = tl.load(statistic_ptr + size + offset, mask=inside, other=float("-inf"))
        columns = tl.load(statistic_ptr + 2 * size + offset, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        highest = tl.max(maxima, 0)
        column = tl.min(tl.where(maxima == highest[None, :], columns, 2147483647), 0).to(tl.int64) + first_column
        # Blocks of the pool come in any order; of equal scores the first row of the pool counts.
        better = (highest > best) | ((highest == best) & (highest > float("-inf")) & (column < hardest))
        hardest = tl.where(better, column, hardest)
        best = tl.where(better, highest, best)
        sums = tl.load(tile_sum_ptr + offset, mask=inside, other=0.0)
        tile_weighted = tl.load(statistic_ptr + 3 * size + offset, mask=inside, other=0.0)
        if safe:
            weighted += tl.sum(tile_weighted, 0)
        else:
            shifts = tl.load(tile_max_ptr + offset, mask=inside, other=float("-inf"))
            new = tl.maximum(before, tl.max(shifts, 0))
            base = tl.where(new == float("-inf"), 0.0, new)
            weighted = _moved(weighted, total, before, base)
            total = total * tl.exp2(before - base) + tl.sum(sums * tl.exp2(shifts - base[None, :]), 0)
            weighted += tl.sum(_moved(tile_weighted, sums, shifts, base[None, :]), 0)
            before = new
    tl.store(higher_ptr + index, higher, mask=valid)
    tl.store(counted_ptr + index, counted, mask=valid)
    tl.store(hardest_ptr + index, hardest, mask=valid)
    tl.store(hardest_exponent_ptr + index, best, mask=valid)
    tl.store(weighted_ptr + index, weighted, mask=valid)


@triton.jit
def _moved(weighted, total, before, shift):
    """Σ 2^(x − shift) · (x − shift) from the same sum with the shift `before`; zero if there is no x."""
    change = before - shift
    return tl.where(total > 0.0, tl.exp2(change) * (weighted + tl.maximum(change, -3.0e38) * total), 0.0)
