"""Forward: row and column sums of each prefix, as kernels/statistics.py computes those of whole embeddings.

The equations are in distributed/objectives/torch_matryoshka.py, STARTS and ENDS in kernels/matryoshka/lengths.py. The
accumulator of a tile is scaled by the inverse lengths of the prefix each time that it reaches the end of a slice:

    cos = accumulator · query_inverse_i · passage_inverse_j,     S = logit_scale · cos
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.statistics import store_sums_and_maxima
from losses.triton.kernels.tile import active_tiles, find_positives, mask_pairs, scale_and_shift, tile_coordinates


@triton.jit
def prefix_sums_kernel(
    query, passage, query_inverse_ptr, passage_inverse_ptr, bounds_ptr, scale_ptr, positive_ptr, query_id_ptr,
    passage_id_ptr, score_ptr, row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, key_ptr, start_ptr, row_cells,
    column_cells, cell_bits, rows, columns, first_row, first_column, queries, passages,
    STARTS: tl.constexpr, ENDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Sums of the tiles for each prefix and, unless SAFE, their maxima. Returns at once if SAFE is not what bounds say.

    Row sums are [prefixes, column tiles, rows], column sums [prefixes, row tiles, columns].
    """
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
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for p in tl.static_range(len(ENDS)):
            for d in range(STARTS[p], ENDS[p], BLOCK_K):
                products = tl.dot(query.load([row, d]), passage.load([column, d]).T, products, input_precision=PRODUCT)
            query_inverse_place = query_inverse_ptr + p * queries + first_row + row_index
            query_factor = tl.load(query_inverse_place, mask=row_valid, other=0.0) * scale
            passage_inverse_place = passage_inverse_ptr + p * passages + first_column + column_index
            passage_inverse = tl.load(passage_inverse_place, mask=column_valid, other=0.0)
            if has_positive:
                positive = positive_column[:, None] == column_index[None, :]
                score = tl.sum(tl.where(positive, products * passage_inverse[None, :], 0.0), 1) * query_factor
                here = row_valid & (positive_column >= column) & (positive_column < column + BLOCK_N)
                here &= positive_column < columns
                tl.store(score_ptr + p * queries + first_row + row_index, score, mask=here)
            row_offset = (p * column_tiles + n).to(tl.int64) * rows + row_index
            column_offset = (p * row_tiles + m).to(tl.int64) * columns + column_index
            # Two branches for the whole epilogue: exponents that both could reach would all stay in registers.
            if (row + BLOCK_M > rows) | (column + BLOCK_N > columns):
                _store_prefix_sums(
                    products, query_factor, passage_inverse, shift, query_id_ptr, passage_id_ptr, key_ptr, start_ptr,
                    row_cells, column_cells, cell_bits, first_row, first_column, row, column, row_index, column_index,
                    row_valid, column_valid, positive_column, row_sum_ptr + row_offset, row_max_ptr + row_offset,
                    column_sum_ptr + column_offset, column_max_ptr + column_offset, BLOCK_M, BLOCK_N, SAFE, SYMMETRIC,
                    HAS_IDS, HAS_EXCLUDED, True,
                )  # fmt: skip
            else:
                _store_prefix_sums(
                    products, query_factor, passage_inverse, shift, query_id_ptr, passage_id_ptr, key_ptr, start_ptr,
                    row_cells, column_cells, cell_bits, first_row, first_column, row, column, row_index, column_index,
                    row_valid, column_valid, positive_column, row_sum_ptr + row_offset, row_max_ptr + row_offset,
                    column_sum_ptr + column_offset, column_max_ptr + column_offset, BLOCK_M, BLOCK_N, SAFE, SYMMETRIC,
                    HAS_IDS, HAS_EXCLUDED, False,
                )  # fmt: skip


@triton.jit
def _store_prefix_sums(
    products, query_factor, passage_inverse, shift, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells,
    column_cells, cell_bits, first_row, first_column, row, column, row_index, column_index, row_valid, column_valid,
    positive_column, row_sum_place, row_max_place, column_sum_place, column_max_place,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Sums of one prefix's tile; with EDGE, the tile may reach beyond the block."""
    exponents = mask_pairs(
        products * passage_inverse[None, :] * query_factor[:, None], query_id_ptr, passage_id_ptr, key_ptr, start_ptr,
        row_cells, column_cells, cell_bits, first_row, first_column, row, column, row_index, column_index, row_valid,
        column_valid, positive_column, BLOCK_M, BLOCK_N, HAS_IDS, HAS_EXCLUDED,
    )  # fmt: skip
    if EDGE:
        exponents = tl.where(row_valid[:, None] & column_valid[None, :], exponents, float("-inf"))
    if SAFE:
        exponentials = tl.exp2(exponents - shift)
        tl.store(row_sum_place, tl.sum(exponentials, 1), mask=row_valid)
        if SYMMETRIC:
            tl.store(column_sum_place, tl.sum(exponentials, 0), mask=column_valid)
    else:
        store_sums_and_maxima(exponents, 1, row_sum_place, row_max_place, 0, row_valid)
        if SYMMETRIC:
            store_sums_and_maxima(exponents, 0, column_sum_place, column_max_place, 0, column_valid)
