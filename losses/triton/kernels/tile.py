"""Helpers of the kernels: coordinates of a tile, its scores, and masks.

A tile has BLOCK_M queries and BLOCK_N passages. It belongs to a block of scores [rows, columns] that begins at
(first_row, first_column) of S. Descriptors cover the block only, so tiles beyond its end read zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Largest exponent after subtracting a constant shift. A sum of 2^40 terms exp(60) is finite in float32, and a term
# that underflows is less than exp(-27) of a sum of at least exp(-60).
MAX_EXPONENT = tl.constexpr(60.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of a cell of excluded pairs (triton/kernels/excluded.py), a power of two, and its base-2 logarithm.
CELL_ROWS, CELL_ROW_BITS = tl.constexpr(128), tl.constexpr(7)


@triton.jit
def tile_coordinates(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: column by column in groups of GROUP rows, so that concurrent tiles share operands."""
    group = tile // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    inside = tile % (GROUP * column_tiles)
    return group * GROUP + inside % height, inside // height


@triton.jit
def tile_products(
    query, passage, row, column, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] float32: products of the queries from `row` on with the passages from `column` on."""
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_K):
        products = tl.dot(query.load([row, d]), passage.load([column, d]).T, products, input_precision=PRODUCT)
    return products


@triton.jit
def negative_products(
    query, passage, guide_query, guide_passage, guide_limit_ptr, first_row, rows, row, column, D: tl.constexpr,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr,
    HAS_GUIDE: tl.constexpr,
):  # fmt: skip
    """`tile_products`; with HAS_GUIDE, minus infinity where the guide's product exceeds the limit of its row.

    The product begins with minus infinity there, so that the mask takes no registers beside it.
    """
    if HAS_GUIDE:
        products = tile_products(guide_query, guide_passage, row, column, G, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT)
        row_index = row + tl.arange(0, BLOCK_M)
        limit = tl.load(guide_limit_ptr + first_row + row_index, mask=row_index < rows, other=0.0)
        products = tl.where(products > limit[:, None], float("-inf"), 0.0)
        for d in range(0, D, BLOCK_K):
            products = tl.dot(query.load([row, d]), passage.load([column, d]).T, products, input_precision=PRODUCT)
    else:
        products = tile_products(query, passage, row, column, D, BLOCK_M, BLOCK_N, BLOCK_K, PRODUCT)
    return products


@triton.jit
def mask_negatives(
    exponents, products, limit_ptr, row_valid, positive_column, has_positive, column_index,
    HAS_LIMIT: tl.constexpr, HAS_GUIDE: tl.constexpr,
):  # fmt: skip
    """Minus infinity at positives, where a product exceeds the limit of its row, and where the guide masks."""
    if HAS_LIMIT:
        limit = tl.load(limit_ptr, mask=row_valid, other=0.0)
        exponents = tl.where(products > limit[:, None], float("-inf"), exponents)
    if HAS_GUIDE:
        exponents = tl.where(products == float("-inf"), float("-inf"), exponents)
    if has_positive:
        exponents = tl.where(positive_column[:, None] == column_index[None, :], float("-inf"), exponents)
    return exponents


@triton.jit
def find_positives(
    positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Columns of the positives in the block [BLOCK_M], and whether the tile contains any of them."""
    if DIAGONAL:
        # The diagonal crosses the tile or not: no positive has to be read.
        positive_column = row_index + (first_row - first_column)
        first = row + (first_row - first_column)
        has_positive = (first < column + BLOCK_N) & (first + BLOCK_M > column)
    else:
        positive_column = (
            tl.load(positive_ptr + first_row + row_index, mask=row_index < rows, other=-1) - first_column
        ).to(tl.int32)
        has_positive = tl.max(((positive_column >= column) & (positive_column < column + BLOCK_N)).to(tl.int32), 0) > 0
    return positive_column, has_positive


@triton.jit
def load_ids(query_id_ptr, passage_id_ptr, row_index, column_index, row_valid, column_valid):
    """Ids of the tile's queries and passages; beyond the block no two are equal."""
    query_id = tl.load(query_id_ptr + row_index, mask=row_valid, other=-1)
    passage_id = tl.load(passage_id_ptr + column_index, mask=column_valid, other=-2)
    return query_id, passage_id


@triton.jit
def mask_equal_ids(exponents, query_id, passage_id, positive_column, column_index):
    """Minus infinity where a passage has the query's id and is not its positive."""
    masked = (query_id[:, None] == passage_id[None, :]) & (positive_column[:, None] != column_index[None, :])
    return tl.where(masked, float("-inf"), exponents)


@triton.jit
def mask_excluded(
    exponents, key_ptr, start_ptr, row_cells, column_cells, cell_bits, row, column, row_index, column_index,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Minus infinity at excluded pairs.

    `row` and `column` are the first of the tile, and `row_index` [BLOCK_M] and `column_index` [BLOCK_N] all of them,
    in the whole matrix. The other arguments are described in triton/kernels/excluded.py.
    """
    cell_row = row >> CELL_ROW_BITS
    last_cell_row = min((row + BLOCK_M - 1) >> CELL_ROW_BITS, row_cells - 1)
    first_cell = column >> cell_bits
    last_cell = min((column + BLOCK_N - 1) >> cell_bits, column_cells - 1)
    while cell_row <= last_cell_row:
        first = cell_row * column_cells
        entry = tl.load(start_ptr + first + first_cell)
        stop = tl.load(start_ptr + first + last_cell + 1)
        while entry < stop:
            key = tl.load(key_ptr + entry)
            row_key = key >> cell_bits
            excluded_row = cell_row * CELL_ROWS + (row_key % CELL_ROWS).to(tl.int32)
            excluded_column = (((row_key >> CELL_ROW_BITS) - first) << cell_bits).to(tl.int32)
            excluded_column += (key - (row_key << cell_bits)).to(tl.int32)
            # A cell may be larger than the tile.
            in_row = (excluded_row >= row) & (excluded_row < row + BLOCK_M)
            if in_row & (excluded_column >= column) & (excluded_column < column + BLOCK_N):
                here = (row_index == excluded_row)[:, None] & (column_index == excluded_column)[None, :]
                exponents = tl.where(here, float("-inf"), exponents)
            entry += 1
        cell_row += 1
    return exponents


@triton.jit
def mask_pairs(
    exponents, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
    first_column, row, column, row_index, column_index, row_valid, column_valid, positive_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """`mask_equal_ids` with HAS_IDS, then `mask_excluded` with HAS_EXCLUDED."""
    if HAS_IDS:
        query_id, passage_id = load_ids(
            query_id_ptr + first_row, passage_id_ptr + first_column, row_index, column_index, row_valid, column_valid
        )
        exponents = mask_equal_ids(exponents, query_id, passage_id, positive_column, column_index)
    if HAS_EXCLUDED:
        exponents = mask_excluded(
            exponents, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row + row, first_column + column,
            first_row + row_index, first_column + column_index, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return exponents


@triton.jit
def active_tiles(tiles, safe, SAFE: tl.constexpr):
    """The number of tiles if SAFE matches the bounds, otherwise zero."""
    return tl.where(safe, tiles, 0) if SAFE else tl.where(safe, 0, tiles)


@triton.jit
def scale_and_shift(bounds_ptr, scale_ptr):
    """Scale and shift that turn products into exponents of 2, and whether this one shift is safe for the whole matrix.

    No score exceeds max‖q‖ · max‖k‖ · |logit_scale|, and no sum that the loss uses is below exp of its positive score.
    If the two are at most 2 · MAX_EXPONENT apart, exp(S − shift) neither overflows nor loses a sum.
    """
    scale = tl.load(scale_ptr)
    bound = tl.sqrt(tl.load(bounds_ptr)) * tl.sqrt(tl.load(bounds_ptr + 1)) * tl.abs(scale)
    safe = bound + tl.load(bounds_ptr + 2) <= 2 * MAX_EXPONENT
    shift = tl.maximum(bound - MAX_EXPONENT, 0.0)
    return scale * LOG2_E, shift * LOG2_E, safe
