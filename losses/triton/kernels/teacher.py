"""InfoNCE with distillation from a teacher's embeddings in Triton: two products for each tile.

    T_ij = scale · t_i · t_j,  masked as S
    KL_i = Σ_j softmax_j(T)_ij (T_ij − S_ij) − log Σ_j exp T_ij + log Σ_j exp S_ij

Forward adds two sums to those of kernels/statistics.py for each row: Σ_j exp(T_ij − shift) and Σ_j exp(T_ij − shift)
(T_ij − S_ij). Backward subtracts exp(T_ij − shift) · teacher_weight_i from M · dS; the weight of a row includes that of
its softmax in the divergence. `constants` [2] are the teacher's scale and its constant shift, as exponents of 2. The
constant shifts are used only if both models' are safe.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.statistics import store_sums_and_maxima
from losses.triton.kernels.tile import (
    active_tiles,
    find_positives,
    mask_pairs,
    scale_and_shift,
    tile_coordinates,
    tile_products,
)


@triton.jit
def _masked_exponents(
    query, passage, teacher_query, teacher_passage, scale, teacher_scale, positive_column, query_id_ptr,
    passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row, first_column, row, column,
    row_index, column_index, row_valid, column_valid,
    D: tl.constexpr, TEACHER_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """(S, T) of a tile as exponents of 2; S is minus infinity where an entry is removed, and T is not masked."""
    theirs = tile_products(
        teacher_query, teacher_passage, row, column, TEACHER_D, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT
    )  # fmt: skip
    exponents = tile_products(query, passage, row, column, D, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT) * scale
    exponents = mask_pairs(
        exponents, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
        first_column, row, column, row_index, column_index, row_valid, column_valid, positive_column, BLOCK_M, BLOCK_N,
        HAS_IDS, HAS_EXCLUDED,
    )  # fmt: skip
    return exponents, theirs * teacher_scale


@triton.jit
def teacher_sums_kernel(
    query, passage, teacher_query, teacher_passage, bounds_ptr, scale_ptr, constant_ptr, positive_ptr, query_id_ptr,
    passage_id_ptr, score_ptr, row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, teacher_sum_ptr,
    teacher_max_ptr, difference_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, rows, columns, first_row,
    first_column,
    D: tl.constexpr, TEACHER_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Sums of the tiles and, unless SAFE, their maxima. Returns at once if SAFE is not what the bounds say."""
    scale, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    if tl.program_id(0) < active_tiles(row_tiles * column_tiles, safe, SAFE):
        m, n = tile_coordinates(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row, column = m * BLOCK_M, n * BLOCK_N
        row_index, column_index = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        row_valid, column_valid = row_index < rows, column_index < columns
        positive_column, has_positive = find_positives(
            positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
        )
        exponents, theirs = _masked_exponents(
            query, passage, teacher_query, teacher_passage, scale, tl.load(constant_ptr), positive_column,
            query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
            first_column, row, column, row_index, column_index, row_valid, column_valid, D, TEACHER_D, BLOCK_M, BLOCK_N,
            BLOCK_K, PRODUCT, HAS_IDS, HAS_EXCLUDED,
        )  # fmt: skip
        if has_positive:
            # A positive is never masked.
            positive = positive_column[:, None] == column_index[None, :]
            score = tl.sum(tl.where(positive, exponents, 0.0), 1)
            here = row_valid & (positive_column >= column) & (positive_column < column + BLOCK_N)
            tl.store(score_ptr + first_row + row_index, score, mask=here & (positive_column < columns))
        if (row + BLOCK_M > rows) | (column + BLOCK_N > columns):
            exponents = tl.where(row_valid[:, None] & column_valid[None, :], exponents, float("-inf"))
        row_offset = n.to(tl.int64) * rows + row_index
        column_offset = m.to(tl.int64) * columns + column_index
        kept = exponents > float("-inf")
        # NaN is kept, so that it reaches the loss.
        kept |= exponents != exponents
        theirs = tl.where(kept, theirs, float("-inf"))
        if SAFE:
            exponentials = tl.exp2(theirs - tl.load(constant_ptr + 1))
        else:
            highest = tl.max(theirs, 1)
            tl.store(teacher_max_ptr + row_offset, highest, mask=row_valid)
            exponentials = tl.exp2(theirs - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
        tl.store(teacher_sum_ptr + row_offset, tl.sum(exponentials, 1), mask=row_valid)
        differences = tl.where(kept, exponentials * (theirs - exponents), 0.0)
        tl.store(difference_ptr + row_offset, tl.sum(differences, 1), mask=row_valid)
        if SAFE:
            exponentials = tl.exp2(exponents - shift)
            tl.store(row_sum_ptr + row_offset, tl.sum(exponentials, 1), mask=row_valid)
            if SYMMETRIC:
                tl.store(column_sum_ptr + column_offset, tl.sum(exponentials, 0), mask=column_valid)
        else:
            store_sums_and_maxima(exponents, 1, row_sum_ptr, row_max_ptr, row_offset, row_valid)
            if SYMMETRIC:
                store_sums_and_maxima(exponents, 0, column_sum_ptr, column_max_ptr, column_offset, column_valid)


@triton.jit
def merge_teacher_kernel(
    bounds_ptr, scale_ptr, constant_ptr, total_ptr, shift_ptr, difference_total_ptr, tile_sum_ptr, tile_max_ptr,
    difference_ptr, rows, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add the tiles' sums of the teacher [tiles, rows] to the totals; a total of zero means that there is none yet."""
    _, _, safe = scale_and_shift(bounds_ptr, scale_ptr)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < rows
    total = tl.load(total_ptr + index, mask=valid, other=0.0)
    differences = tl.load(difference_total_ptr + index, mask=valid, other=0.0)
    highest = tl.load(shift_ptr + index, mask=valid, other=0.0)
    constant = tl.load(constant_ptr + 1)
    highest = tl.zeros_like(highest) + constant if safe else tl.where(total == 0.0, float("-inf"), highest)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        offset = tile.to(tl.int64)[:, None] * rows + index[None, :]
        inside = (tile < tiles)[:, None] & valid[None, :]
        sums = tl.load(tile_sum_ptr + offset, mask=inside, other=0.0)
        added = tl.load(difference_ptr + offset, mask=inside, other=0.0)
        if safe:
            total += tl.sum(sums, 0)
            differences += tl.sum(added, 0)
        else:
            maxima = tl.load(tile_max_ptr + offset, mask=inside, other=float("-inf"))
            # A fully masked row of a tile has maximum minus infinity; avoid subtracting infinities.
            new = tl.maximum(highest, tl.max(maxima, 0))
            base = tl.where(new == float("-inf"), 0.0, new)
            factor, factors = tl.exp2(highest - base), tl.exp2(maxima - base[None, :])
            total = total * factor + tl.sum(sums * factors, 0)
            differences = differences * factor + tl.sum(added * factors, 0)
            highest = new
    tl.store(total_ptr + index, total, mask=valid)
    tl.store(difference_total_ptr + index, differences, mask=valid)
    tl.store(shift_ptr + index, highest, mask=valid)


@triton.jit
def teacher_gradient_kernel(
    query, passage, teacher_query, teacher_passage, gradient, bounds_ptr, scale_ptr, constant_ptr, positive_ptr,
    query_id_ptr, passage_id_ptr, row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr,
    teacher_weight_ptr, teacher_shift_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, rows, columns,
    first_row, first_column,
    D: tl.constexpr, TEACHER_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """A block of M · dS. Returns at once if SAFE is not what the bounds say."""
    scale, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    if tl.program_id(0) < active_tiles(row_tiles * column_tiles, safe, SAFE):
        m, n = tile_coordinates(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row, column = m * BLOCK_M, n * BLOCK_N
        row_index, column_index = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        row_valid, column_valid = row_index < rows, column_index < columns
        positive_column, has_positive = find_positives(
            positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
        )
        exponents, theirs = _masked_exponents(
            query, passage, teacher_query, teacher_passage, scale, tl.load(constant_ptr), positive_column,
            query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
            first_column, row, column, row_index, column_index, row_valid, column_valid, D, TEACHER_D, BLOCK_M, BLOCK_N,
            BLOCK_K, PRODUCT, HAS_IDS, HAS_EXCLUDED,
        )  # fmt: skip
        row_place, column_place = first_row + row_index, first_column + column_index
        row_weight = tl.load(row_weight_ptr + row_place, mask=row_valid, other=0.0)
        teacher_weight = tl.load(teacher_weight_ptr + row_place, mask=row_valid, other=0.0)
        if SAFE:
            factor = row_weight[:, None]
            if SYMMETRIC:
                column_weight = tl.load(column_weight_ptr + column_place, mask=column_valid, other=0.0)
                factor = factor + column_weight[None, :]
            values = tl.exp2(exponents - shift) * factor
            their_values = tl.exp2(theirs - tl.load(constant_ptr + 1)) * teacher_weight[:, None]
        else:
            row_shift = tl.load(row_shift_ptr + row_place, mask=row_valid, other=0.0)
            values = tl.exp2(exponents - row_shift[:, None]) * row_weight[:, None]
            if SYMMETRIC:
                column_shift = tl.load(column_shift_ptr + column_place, mask=column_valid, other=0.0)
                column_weight = tl.load(column_weight_ptr + column_place, mask=column_valid, other=0.0)
                # Columns that are not a positive may have no maximum; the clamp avoids an overflow.
                exponentials = tl.exp2(tl.minimum(exponents - column_shift[None, :], 0.0))
                values += tl.where(column_weight[None, :] != 0, exponentials * column_weight[None, :], 0.0)
            teacher_shift = tl.load(teacher_shift_ptr + row_place, mask=row_valid, other=0.0)
            # A removed entry may exceed the row's maximum; it is dropped below.
            their_values = tl.exp2(tl.minimum(theirs - teacher_shift[:, None], 0.0)) * teacher_weight[:, None]
        values -= tl.where(exponents > float("-inf"), their_values, 0.0)
        if has_positive:
            values = tl.where(positive_column[:, None] == column_index[None, :], values - 1.0, values)
        if PRODUCT == "tf32":
            # Round to tf32's 10 bits: tensor cores would truncate.
            values = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        gradient.store([row, column], values.to(gradient.dtype))
