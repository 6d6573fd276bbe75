"""Backward of InfoNCE: a block of M · dS in the operand dtype, from recomputed or kept exponentials.

    M · dS_ij = exp(S_ij − shift) · (row_weight_i + column_weight_j) − 1[j = p(i)]

cuBLAS multiplies it into the gradients of queries and passages. `gradient_epilogue_kernel` scales them and computes
the gradient of logit_scale, Σ dS ∘ (Q Kᵀ) = Σ Q ∘ (dS K). The weights and the subtracted 1 are multiplied by
`ds_scale`, a power of two that brings dS into the range of half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import (
    active_tiles,
    find_positives,
    load_ids,
    mask_equal_ids,
    mask_excluded,
    mask_negatives,
    negative_products,
    scale_and_shift,
    tile_coordinates,
)


@triton.jit
def gradient_weights_kernel(
    ds_scale_ptr, positive_count_ptr, row_sum_ptr, column_sum_ptr, row_weight_ptr, column_weight_ptr, rows, columns,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Factors of exp(S − shift): the weight of a row or column in the loss, divided by its sum.

    They are zero for columns that are not a positive.
    """
    ds_scale = tl.load(ds_scale_ptr)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    half = 0.5 if SYMMETRIC else 1.0
    row_sum = tl.load(row_sum_ptr + index, mask=index < rows, other=1.0)
    tl.store(row_weight_ptr + index, ds_scale * half / row_sum, mask=index < rows)
    if SYMMETRIC:
        valid = index < columns
        positive_count = (
            (index < rows).to(tl.float32) if DIAGONAL else tl.load(positive_count_ptr + index, mask=valid, other=0.0)
        )
        column_sum = tl.load(column_sum_ptr + index, mask=valid, other=1.0)
        weight = tl.where(positive_count > 0, ds_scale * half * positive_count / column_sum, 0.0)
        tl.store(column_weight_ptr + index, weight, mask=valid)


@triton.jit
def score_gradient_kernel(
    query, passage, kept, gradient, bounds_ptr, scale_ptr, ds_scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr,
    score_ptr, row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr, key_ptr, start_ptr, row_cells,
    column_cells, cell_bits, guide_query, guide_passage, guide_limit_ptr, limit_ptr, rows, columns, first_row,
    first_column,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, KEPT: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_GUIDE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """A block of ds_scale · M · dS, zero at the positives with NEGATIVES. Returns if SAFE does not match the bounds."""
    scale, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tiles = active_tiles(row_tiles * column_tiles, safe, SAFE)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            m, n = tile_coordinates(tile, row_tiles, column_tiles, GROUP)
            if KEPT:
                values = kept.load([m * BLOCK_M, n * BLOCK_N]).to(tl.float32)
            else:
                values = negative_products(
                    query, passage, guide_query, guide_passage, guide_limit_ptr, first_row, rows, m * BLOCK_M,
                    n * BLOCK_N, D, G, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT, HAS_GUIDE,
                )  # fmt: skip
            _store_gradient(
                values, gradient, scale, shift, ds_scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
                row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr, key_ptr, start_ptr, row_cells,
                column_cells, cell_bits, limit_ptr, rows, columns, first_row, first_column, m, n, BLOCK_M, BLOCK_N,
                PRODUCT, SAFE, SYMMETRIC, DIAGONAL, HAS_IDS, HAS_EXCLUDED, KEPT, NEGATIVES, HAS_LIMIT, HAS_GUIDE,
            )  # fmt: skip
    elif tl.program_id(0) < tiles:
        m, n = tile_coordinates(tl.program_id(0), row_tiles, column_tiles, GROUP)
        if KEPT:
            values = kept.load([m * BLOCK_M, n * BLOCK_N]).to(tl.float32)
        else:
            values = negative_products(
                query, passage, guide_query, guide_passage, guide_limit_ptr, first_row, rows, m * BLOCK_M,
                n * BLOCK_N, D, G, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT, HAS_GUIDE,
            )  # fmt: skip
        _store_gradient(
            values, gradient, scale, shift, ds_scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
            row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr, key_ptr, start_ptr, row_cells,
            column_cells, cell_bits, limit_ptr, rows, columns, first_row, first_column, m, n, BLOCK_M, BLOCK_N, PRODUCT,
            SAFE, SYMMETRIC, DIAGONAL, HAS_IDS, HAS_EXCLUDED, KEPT, NEGATIVES, HAS_LIMIT, HAS_GUIDE,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    values, gradient, scale, shift, ds_scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, score_ptr,
    row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr, key_ptr, start_ptr, row_cells, column_cells,
    cell_bits, limit_ptr, rows, columns, first_row, first_column, m, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, KEPT: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_GUIDE: tl.constexpr,
):  # fmt: skip
    """Turn products, or exponentials kept by forward, into the tile of the gradient and store it."""
    row, column = m * BLOCK_M, n * BLOCK_N
    row_index, column_index = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = row_index < rows, column_index < columns
    row_weight = tl.load(row_weight_ptr + first_row + row_index, mask=row_valid, other=0.0)
    MASKED: tl.constexpr = HAS_IDS and not KEPT
    if MASKED:
        # Loaded before the threads synchronize below.
        query_id, passage_id = load_ids(
            query_id_ptr + first_row, passage_id_ptr + first_column, row_index, column_index, row_valid, column_valid
        )
    positive_column, has_positive = find_positives(
        positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
    )
    if SAFE:
        if not KEPT:
            products = values
            values = products * scale - shift
            if NEGATIVES:
                values = mask_negatives(
                    values, products, limit_ptr + first_row + row_index, row_valid, positive_column, has_positive,
                    column_index, HAS_LIMIT, HAS_GUIDE,
                )  # fmt: skip
            if MASKED:
                # This masks positives too; they are set from their scores below.
                values = tl.where(query_id[:, None] == passage_id[None, :], float("-inf"), values)
            if HAS_EXCLUDED:
                values = mask_excluded(
                    values, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row + row,
                    first_column + column, first_row + row_index, first_column + column_index, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            values = tl.exp2(values)
        values = _apply_weights(
            values, row_weight, column_weight_ptr + first_column, column_index, column_valid, SYMMETRIC
        )
    else:
        exponents = values * scale
        if NEGATIVES:
            exponents = mask_negatives(
                exponents, values, limit_ptr + first_row + row_index, row_valid, positive_column, has_positive,
                column_index, HAS_LIMIT, HAS_GUIDE,
            )  # fmt: skip
        if MASKED:
            exponents = mask_equal_ids(exponents, query_id, passage_id, positive_column, column_index)
        if HAS_EXCLUDED:
            exponents = mask_excluded(
                exponents, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row + row,
                first_column + column, first_row + row_index, first_column + column_index, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        row_shift = tl.load(row_shift_ptr + first_row + row_index, mask=row_valid, other=0.0)
        values = tl.exp2(exponents - row_shift[:, None]) * row_weight[:, None]
        if SYMMETRIC:
            column_shift = tl.load(column_shift_ptr + first_column + column_index, mask=column_valid, other=0.0)
            column_weight = tl.load(column_weight_ptr + first_column + column_index, mask=column_valid, other=0.0)
            # Columns that are not a positive may have no maximum. Their weight is zero; the clamp avoids an overflow.
            exponentials = tl.exp2(tl.minimum(exponents - column_shift[None, :], 0.0))
            values += tl.where(column_weight[None, :] > 0, exponentials * column_weight[None, :], 0.0)
    if not NEGATIVES:  # noqa: SIM102 - known when the kernel is compiled
        if has_positive:
            positive = positive_column[:, None] == column_index[None, :]
            if SAFE and (KEPT or HAS_IDS):
                # A kept exponential is rounded, and subtracting 1 would magnify the error; a masked one is zero.
                score = tl.load(score_ptr + first_row + row_index, mask=row_valid, other=0.0)
                exact = tl.exp2(score - shift)[:, None] + tl.zeros_like(values)
                exact = _apply_weights(
                    exact, row_weight, column_weight_ptr + first_column, column_index, column_valid, SYMMETRIC
                )
                values = tl.where(positive, exact, values)
            values = tl.where(positive, values - tl.load(ds_scale_ptr), values)
    if PRODUCT == "tf32":
        # Round to tf32's 10 bits: tensor cores would truncate.
        values = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    gradient.store([row, column], values.to(gradient.dtype))


@triton.jit
def _apply_weights(exponentials, row_weight, column_weight_ptr, column_index, column_valid, SYMMETRIC: tl.constexpr):
    if SYMMETRIC:
        column_weight = tl.load(column_weight_ptr + column_index, mask=column_valid, other=0.0)
        return exponentials * (row_weight[:, None] + column_weight[None, :])
    return exponentials * row_weight[:, None]


@triton.jit
def gradient_epilogue_kernel(
    sum_ptr, embedding_ptr, out_ptr, scale_ptr, ds_scale_ptr, upstream_ptr, partial_ptr, divisor, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Scale sums [rows, WIDTH] of M · dS products to gradients [rows, D].

    The factor is logit_scale · upstream / (divisor · ds_scale); the divisor is M, or M / W over W ranks. With SCALE,
    also write each program's part of the gradient of logit_scale, Σ sum ∘ embedding · upstream / (divisor · ds_scale).
    `out` may be the sums themselves.
    """
    factor = tl.load(upstream_ptr) / (divisor * tl.load(ds_scale_ptr))
    scale = tl.load(scale_ptr)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    partial = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        sums = tl.load(sum_ptr + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        if SCALE:
            embedding = tl.load(embedding_ptr + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
            partial += tl.sum(sums * embedding.to(tl.float32), 1)
        target_ptr = out_ptr + row[:, None] * D + column[None, :]
        tl.store(target_ptr, (sums * (factor * scale)).to(out_ptr.dtype.element_ty), mask=inside)
    if SCALE:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(partial, 0) * factor)
