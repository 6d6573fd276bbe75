"""Sigmoid loss and its derivative in one pass over each tile, with one exponential per pair and no logarithm.

    x = logit_scale · q_i · k_j + logit_bias, negated at the positive; u = exp(−|x|)
    loss = softplus(x) = max(x, 0) + log(1 + u)        M · dS_ij = ± σ(x) = ± (x ≥ 0 ? 1 : u) / (1 + u)

log(1 + u) is u times a polynomial. It keeps terms that are far below the rounding of 1 and costs less than a logarithm
on the special function unit. Each tile writes its sums of losses and derivatives to its own elements of an array.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import (
    LOG2_E,
    find_positives,
    mask_pairs,
    tile_coordinates,
    tile_products,
)


@triton.jit
def sigmoid_kernel(
    query, passage, gradient, scale_ptr, bias_ptr, positive_ptr, query_id_ptr, passage_id_ptr, sum_ptr, key_ptr,
    start_ptr, row_cells, column_cells, cell_bits, rows, columns, first_row, first_column,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, PRODUCT: tl.constexpr, DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr, GRADIENT: tl.constexpr, DS_SCALE: tl.constexpr,
):  # fmt: skip
    """Write sums [tiles, 2] of losses / log 2 and of M · dS and, if GRADIENT, a block of DS_SCALE · M · dS."""
    scale, bias = tl.load(scale_ptr) * LOG2_E, tl.load(bias_ptr) * LOG2_E
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tiles = row_tiles * column_tiles
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            m, n = tile_coordinates(tile, row_tiles, column_tiles, GROUP)
            products = tile_products(query, passage, m * BLOCK_M, n * BLOCK_N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT)
            _store_tile(
                products, gradient, scale, bias, positive_ptr, query_id_ptr, passage_id_ptr, sum_ptr, key_ptr,
                start_ptr, row_cells, column_cells, cell_bits, rows, columns, first_row, first_column, m, n, tile,
                BLOCK_M, BLOCK_N, DIAGONAL, HAS_IDS, HAS_EXCLUDED, GRADIENT, DS_SCALE,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        m, n = tile_coordinates(tile, row_tiles, column_tiles, GROUP)
        products = tile_products(query, passage, m * BLOCK_M, n * BLOCK_N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT)
        _store_tile(
            products, gradient, scale, bias, positive_ptr, query_id_ptr, passage_id_ptr, sum_ptr, key_ptr, start_ptr,
            row_cells, column_cells, cell_bits, rows, columns, first_row, first_column, m, n, tile, BLOCK_M, BLOCK_N,
            DIAGONAL, HAS_IDS, HAS_EXCLUDED, GRADIENT, DS_SCALE,
        )  # fmt: skip


@triton.jit
def _store_tile(
    products, gradient, scale, bias, positive_ptr, query_id_ptr, passage_id_ptr, sum_ptr, key_ptr, start_ptr, row_cells,
    column_cells, cell_bits, rows, columns, first_row, first_column, m, n, tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr, GRADIENT: tl.constexpr, DS_SCALE: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = gradient.dtype == tl.float32
    row, column = m * BLOCK_M, n * BLOCK_N
    row_index, column_index = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    row_valid, column_valid = row_index < rows, column_index < columns
    positive_column, has_positive = find_positives(
        positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
    )
    # Exponents of 2. Masked pairs are minus infinity: their loss and derivative are zero.
    exponents = products * scale + bias
    exponents = mask_pairs(
        exponents, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
        first_column, row, column, row_index, column_index, row_valid, column_valid, positive_column, BLOCK_M, BLOCK_N,
        HAS_IDS, HAS_EXCLUDED,
    )  # fmt: skip
    if (row + BLOCK_M > rows) | (column + BLOCK_N > columns):
        exponents = tl.where(row_valid[:, None] & column_valid[None, :], exponents, float("-inf"))
    # Few tiles contain a positive; the others skip the mask.
    if has_positive:
        valid = row_valid[:, None] & column_valid[None, :]
        positive = (positive_column[:, None] == column_index[None, :]) & valid
        loss, values = _loss_and_derivative(tl.where(positive, -exponents, exponents), EXACT)
        values = tl.where(positive, -values, values)
    else:
        loss, values = _loss_and_derivative(exponents, EXACT)
    tl.store(sum_ptr + 2 * tile, loss)
    if GRADIENT:
        tl.store(sum_ptr + 2 * tile + 1, tl.sum(tl.sum(values, 1), 0))
        gradient.store([row, column], (values * DS_SCALE).to(gradient.dtype))


@triton.jit
def _loss_and_derivative(exponents, EXACT: tl.constexpr):
    """The sum over all x of log2(1 + 2^x), and 2^x / (1 + 2^x) for each x."""
    above = tl.exp2(-tl.abs(exponents))
    losses = above * _log2_1p_over_u(above, EXACT) + tl.maximum(exponents, 0.0)
    reciprocal = _reciprocal_1p(above, EXACT)
    return tl.sum(tl.sum(losses, 1), 0), tl.where(exponents >= 0.0, reciprocal, above * reciprocal)


@triton.jit
def _log2_1p_over_u(u, EXACT: tl.constexpr):
    """log2(1 + u) / u for u in [0, 1]: minimax polynomial, relative error 7e-5 or, if EXACT, 4e-8; exact at zero."""
    if EXACT:
        p = 0.00773980322 * u - 0.0433757605
        p = p * u + 0.114267976
        p = p * u - 0.198425412
        p = p * u + 0.276328824
        p = p * u - 0.358613067
        p = p * u + 0.480725069
        p = p * u - 0.721342442
    else:
        p = 0.06218413 * u - 0.23278738
        p = p * u + 0.44611038
        p = p * u - 0.71813542
    return p * u + LOG2_E


@triton.jit
def _reciprocal_1p(u, EXACT: tl.constexpr):
    """1 / (1 + u) for u in [0, 1]: exact if EXACT, otherwise minimax to 4e-4, less than half-precision rounding."""
    if EXACT:
        reciprocal = 1.0 / (1.0 + u)
    else:
        reciprocal = 0.16043873 * u - 0.55147389
        reciprocal = reciprocal * u + 0.88001564
        reciprocal = reciprocal * u - 0.98880313
        reciprocal = reciprocal * u + 1.0
    return reciprocal
