"""Forward of InfoNCE: softmax denominators of all rows and columns of S, from one pass over each tile.

    row_sum_i = Σ_j exp(S_ij − shift_i)      column_sum_j = Σ_i exp(S_ij − shift_j)      score_i = S_i,p(i)

If one shift is safe for the whole matrix (`tile.scale_and_shift`), one exponential per score serves both sums;
otherwise rows and columns have their own running maxima. Each tile writes its sums to its own elements of an array,
and a second kernel adds them in a fixed order, so results are deterministic. Saved for backward: sums, shifts, scores
and, if there is memory for them, the exponentials in half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.row_statistics import store_negatives, store_weighted_exponents
from losses.triton.kernels.tile import (
    LOG2_E,
    active_tiles,
    find_positives,
    mask_negatives,
    mask_pairs,
    negative_products,
    scale_and_shift,
    tile_coordinates,
)

MERGE_BLOCK = 64
MERGE_TILES = 16


@triton.jit
def tile_sums_kernel(
    query, passage, kept, bounds_ptr, scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
    row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits,
    guide_query, guide_passage, guide_limit_ptr, limit_ptr, own_product_ptr, statistic_ptr, statistic_size,
    rows, columns, first_row, first_column,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, KEEP: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_GUIDE: tl.constexpr, G: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """Sums of the tiles and, unless SAFE, their maxima. Returns at once if SAFE does not match the bounds.

    With NEGATIVES, the positives are masked, and their scores are not stored.
    """
    scale, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tiles = active_tiles(row_tiles * column_tiles, safe, SAFE)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            m, n = tile_coordinates(tile, row_tiles, column_tiles, GROUP)
            products = negative_products(
                query, passage, guide_query, guide_passage, guide_limit_ptr, first_row, rows, m * BLOCK_M, n * BLOCK_N,
                D, G, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT, HAS_GUIDE,
            )  # fmt: skip
            _store_tile_sums(
                products, kept, scale, shift, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
                row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, key_ptr, start_ptr, row_cells, column_cells,
                cell_bits, limit_ptr, own_product_ptr, statistic_ptr, statistic_size, rows, columns, first_row,
                first_column, m, n, BLOCK_M, BLOCK_N, SAFE, SYMMETRIC, DIAGONAL, HAS_IDS, HAS_EXCLUDED, KEEP, NEGATIVES,
                HAS_LIMIT, HAS_GUIDE, STATISTICS,
            )  # fmt: skip
    elif tl.program_id(0) < tiles:
        m, n = tile_coordinates(tl.program_id(0), row_tiles, column_tiles, GROUP)
        products = negative_products(
            query, passage, guide_query, guide_passage, guide_limit_ptr, first_row, rows, m * BLOCK_M, n * BLOCK_N,
            D, G, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT, HAS_GUIDE,
        )  # fmt: skip
        _store_tile_sums(
            products, kept, scale, shift, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
            row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, key_ptr, start_ptr, row_cells, column_cells,
            cell_bits, limit_ptr, own_product_ptr, statistic_ptr, statistic_size, rows, columns, first_row,
            first_column, m, n, BLOCK_M, BLOCK_N, SAFE, SYMMETRIC, DIAGONAL, HAS_IDS, HAS_EXCLUDED, KEEP, NEGATIVES,
            HAS_LIMIT, HAS_GUIDE, STATISTICS,
        )  # fmt: skip


@triton.jit
def _store_tile_sums(
    products, kept, scale, shift, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
    row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits,
    limit_ptr, own_product_ptr, statistic_ptr, statistic_size, rows, columns, first_row, first_column, m, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, KEEP: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_GUIDE: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    row, column = m * BLOCK_M, n * BLOCK_N
    row_index, column_index = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = row_index < rows, column_index < columns
    positive_column, has_positive = find_positives(
        positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
    )
    exponents = products * scale
    if NEGATIVES:
        exponents = mask_negatives(
            exponents, products, limit_ptr + first_row + row_index, row_valid, positive_column, has_positive,
            column_index, HAS_LIMIT, HAS_GUIDE,
        )  # fmt: skip
    else:
        if has_positive:
            positive = positive_column[:, None] == column_index[None, :]
            score = tl.sum(tl.where(positive, exponents, 0.0), 1)
            here = (
                row_valid
                & (positive_column >= column)
                & (positive_column < column + BLOCK_N)
                & (positive_column < columns)
            )
            tl.store(score_ptr + first_row + row_index, score, mask=here)
    exponents = mask_pairs(
        exponents, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
        first_column, row, column, row_index, column_index, row_valid, column_valid, positive_column, BLOCK_M, BLOCK_N,
        HAS_IDS, HAS_EXCLUDED,
    )  # fmt: skip
    if (row + BLOCK_M > rows) | (column + BLOCK_N > columns):
        exponents = tl.where(row_valid[:, None] & column_valid[None, :], exponents, float("-inf"))
    row_offset = n.to(tl.int64) * rows + row_index
    column_offset = m.to(tl.int64) * columns + column_index
    if STATISTICS:
        own_exponent = tl.load(own_product_ptr + first_row + row_index, mask=row_valid, other=0.0) * scale
        store_negatives(exponents, own_exponent, column_index, statistic_ptr, statistic_size, row_offset, row_valid)
    if SAFE:
        shifted = exponents - shift
        exponentials = tl.exp2(shifted)
        if STATISTICS:
            store_weighted_exponents(shifted, exponentials, statistic_ptr, statistic_size, row_offset, row_valid)
        tl.store(row_sum_ptr + row_offset, tl.sum(exponentials, 1), mask=row_valid)
        if SYMMETRIC:
            tl.store(column_sum_ptr + column_offset, tl.sum(exponentials, 0), mask=column_valid)
        if KEEP:
            kept.store([row, column], exponentials.to(kept.dtype))
    else:
        shifted, exponentials = store_sums_and_maxima(exponents, 1, row_sum_ptr, row_max_ptr, row_offset, row_valid)
        if STATISTICS:
            store_weighted_exponents(shifted, exponentials, statistic_ptr, statistic_size, row_offset, row_valid)
        if SYMMETRIC:
            store_sums_and_maxima(exponents, 0, column_sum_ptr, column_max_ptr, column_offset, column_valid)


@triton.jit
def store_sums_and_maxima(exponents, axis: tl.constexpr, sum_ptr, max_ptr, offset, valid):
    highest = tl.max(exponents, axis)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    shifted = exponents - tl.expand_dims(finite, axis)
    exponentials = tl.exp2(shifted)
    tl.store(sum_ptr + offset, tl.sum(exponentials, axis), mask=valid)
    tl.store(max_ptr + offset, highest, mask=valid)
    return shifted, exponentials


@triton.jit
def merge_sums_kernel(
    bounds_ptr, scale_ptr, row_total_ptr, row_shift_ptr, row_sum_ptr, row_max_ptr, rows, column_tiles,
    column_total_ptr, column_shift_ptr, column_sum_ptr, column_max_ptr, columns, row_tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add a block's tile sums to the totals: rows in programs (·, 0), columns in programs (·, 1)."""
    _, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    index = tl.program_id(0) * BLOCK
    if (tl.program_id(1) == 0) & (index < rows):
        _merge_tile_sums(
            row_total_ptr, row_shift_ptr, row_sum_ptr, row_max_ptr, rows, column_tiles, shift, safe, BLOCK, TILES
        )
    if (tl.program_id(1) == 1) & (index < columns):
        _merge_tile_sums(
            column_total_ptr, column_shift_ptr, column_sum_ptr, column_max_ptr, columns, row_tiles, shift, safe, BLOCK,
            TILES,
        )  # fmt: skip


@triton.jit
def _merge_tile_sums(
    total_ptr, shift_ptr, tile_sum_ptr, tile_max_ptr, size, tiles, shift, safe, BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Add tile sums [tiles, size] to totals [size]; a total of zero means that there is no sum yet."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < size
    total = tl.load(total_ptr + index, mask=valid, other=0.0)
    highest = tl.load(shift_ptr + index, mask=valid, other=0.0)
    highest = tl.zeros_like(highest) + shift if safe else tl.where(total == 0.0, float("-inf"), highest)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        offset = tile.to(tl.int64)[:, None] * size + index[None, :]
        inside = (tile < tiles)[:, None] & valid[None, :]
        sums = tl.load(tile_sum_ptr + offset, mask=inside, other=0.0)
        if safe:
            total += tl.sum(sums, 0)
        else:
            maxima = tl.load(tile_max_ptr + offset, mask=inside, other=float("-inf"))
            # A fully masked column has maximum minus infinity; avoid subtracting infinities.
            new = tl.maximum(highest, tl.max(maxima, 0))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(highest - base) + tl.sum(sums * tl.exp2(maxima - base[None, :]), 0)
            highest = new
    tl.store(total_ptr + index, total, mask=valid)
    tl.store(shift_ptr + index, highest, mask=valid)


@triton.jit
def loss_kernel(
    bounds_ptr, positive_ptr, score_ptr, row_sum_ptr, row_shift_ptr, column_sum_ptr, column_shift_ptr, loss_ptr, rows,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program's part of the mean loss, over rows and over their positives' columns. Exponents are of 2."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    score = tl.load(score_ptr + row, mask=valid, other=0.0)
    loss = negative_log_probability(score, row_sum_ptr, row_shift_ptr, row, valid)
    # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
    invalid = tl.load(bounds_ptr + 3) > 0
    if SYMMETRIC:
        column = row
        if not DIAGONAL:
            # With invalid inputs a positive may be out of range.
            column = tl.where(invalid, 0, tl.load(positive_ptr + row, mask=valid, other=0))
        loss = (loss + negative_log_probability(score, column_sum_ptr, column_shift_ptr, column, valid)) * 0.5
    partial = tl.sum(tl.where(valid, loss, 0.0), 0) / rows
    tl.store(loss_ptr + tl.program_id(0), tl.where(invalid, float("nan"), partial))


@triton.jit
def negative_log_probability(score, sum_ptr, shift_ptr, index, valid):
    """−log(2^score / (2^shift · sum)), accurate for probabilities near one."""
    total = tl.load(sum_ptr + index, mask=valid, other=1.0)
    margin = score - tl.load(shift_ptr + index, mask=valid, other=0.0)
    ratio = total * tl.exp2(-margin)
    # The quotient of numbers far apart overflows; the difference of their logarithms does not.
    return tl.where(ratio < 1e30, tl.log2(ratio), tl.log2(total) - margin) / LOG2_E
