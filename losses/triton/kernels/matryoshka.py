"""Matryoshka in Triton: scores of all prefixes of the embeddings from one product.

The equations are in distributed/objectives/torch_matryoshka.py.
The columns of the operands are packed: each slice, the columns that a prefix adds to the previous one, begins at a
multiple of the step of the product and is padded with zeros. STARTS and ENDS are the slices in the packed operands. The
accumulator of a tile is scaled by the inverse lengths of the prefix each time that it reaches the end of a slice:

    cos = accumulator · query_inverse_i · passage_inverse_j,     S = logit_scale · cos

Forward writes the row and column sums of each prefix, as kernels/statistics.py does. Backward writes, for each slice n,
a tile of H_n = Σ_{m ≥ n} dS_m · query_inverse_m · passage_inverse_m to the workspace, and sums of dS_m · cos over the
rows and columns of the tile. The workspace is [slices · stride, columns]: H_n begins at row n · stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.statistics import store_sums_and_maxima
from losses.triton.kernels.tile import (
    active_tiles,
    find_positives,
    load_ids,
    mask_equal_ids,
    mask_excluded,
    scale_and_shift,
    tile_coordinates,
)

# Prefixes that are shorter count as zero, as in losses/reference.py.
SHORTEST_PREFIX = tl.constexpr(1e-12)


@triton.jit
def inverse_lengths_kernel(
    side_ptr, inverse_ptr, rows, STARTS: tl.constexpr, ENDS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """inverse [prefixes, rows]: 1 / length of each prefix of packed rows, or 0 if the prefix is zero."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for m in tl.static_range(len(ENDS)):
        for d in range(STARTS[m], ENDS[m], BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = (row < rows)[:, None] & (column < ENDS[m])[None, :]
            offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            values = tl.load(side_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, 1)
        length = tl.sqrt(squares)
        inverse = tl.where(length >= SHORTEST_PREFIX, 1 / length, 0.0)
        tl.store(inverse_ptr + m * rows + row, inverse, mask=row < rows)


@triton.jit
def lowest_positive_kernel(
    query_ptr, passage_ptr, positive_ptr, scale_ptr, query_inverse_ptr, passage_inverse_ptr, bounds_ptr, queries,
    passages, STARTS: tl.constexpr, ENDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Raise bounds[2] to minus the lowest score of a positive over all prefixes; the positives are in the block."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < queries
    positive = tl.load(positive_ptr + row, mask=valid, other=0)
    valid &= (positive >= 0) & (positive < passages)
    product = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    scale = tl.load(scale_ptr)
    highest = tl.full((), 0.0, tl.float32)
    for m in tl.static_range(len(ENDS)):
        for d in range(STARTS[m], ENDS[m], BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = valid[:, None] & (column < ENDS[m])[None, :]
            query_offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            query = tl.load(query_ptr + query_offsets, mask=inside, other=0.0).to(tl.float32)
            passage_offsets = positive.to(tl.int64)[:, None] * WIDTH + column[None, :]
            passage = tl.load(passage_ptr + passage_offsets, mask=inside, other=0.0).to(tl.float32)
            product += tl.sum(query * passage, 1)
        inverse = tl.load(query_inverse_ptr + m * queries + row, mask=valid, other=0.0)
        inverse *= tl.load(passage_inverse_ptr + m * passages + positive, mask=valid, other=0.0)
        negative = -product * inverse * scale
        # NaN becomes infinity: no constant shift is safe then.
        highest = tl.maximum(highest, tl.max(tl.where(negative == negative, negative, float("inf")), 0))
    # Non-negative floats are ordered as their bits.
    tl.atomic_max(bounds_ptr.to(tl.pointer_type(tl.int32)) + 2, highest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _mask(
    exponents, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row,
    first_column, row, column, row_index, column_index, row_valid, column_valid, positive_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Minus infinity where an entry is removed from S; the same entries for every prefix."""
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
    exponents = _mask(
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


@triton.jit
def prefix_gradient_kernel(
    query, passage, gradient, query_inverse_ptr, passage_inverse_ptr, bounds_ptr, scale_ptr, prefix_weight_ptr,
    positive_ptr, query_id_ptr, passage_id_ptr, row_weight_ptr, row_shift_ptr, column_weight_ptr, column_shift_ptr,
    row_along_ptr, column_along_ptr, key_ptr, start_ptr, row_cells, column_cells, cell_bits, rows, columns, first_row,
    first_column, queries, passages, stride,
    STARTS: tl.constexpr, ENDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRODUCT: tl.constexpr, SAFE: tl.constexpr, SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Tiles of H_n for each slice, and sums of dS · cos. Returns at once if SAFE is not what the bounds say.

    `row_along` is [prefixes, column tiles, rows], `column_along` [prefixes, row tiles, columns].
    """
    scale, shift, safe = scale_and_shift(bounds_ptr, scale_ptr)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    if tl.program_id(0) < active_tiles(row_tiles * column_tiles, safe, SAFE):
        m, n = tile_coordinates(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row, column = m * BLOCK_M, n * BLOCK_N
        row_index = row + tl.arange(0, BLOCK_M)
        row_valid = row_index < rows
        positive_column, has_positive = find_positives(
            positive_ptr, first_row, first_column, rows, row, row_index, column, BLOCK_M, BLOCK_N, DIAGONAL
        )
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # The gradients of the prefixes, which are added up from the last to the first.
        gradients = ()
        for p in tl.static_range(len(ENDS)):
            for d in range(STARTS[p], ENDS[p], BLOCK_K):
                products = tl.dot(query.load([row, d]), passage.load([column, d]).T, products, input_precision=PRODUCT)
            row_place = p * queries + first_row + row_index
            query_inverse = tl.load(query_inverse_ptr + row_place, mask=row_valid, other=0.0)
            row_weight = tl.load(row_weight_ptr + row_place, mask=row_valid, other=0.0) * query_inverse
            row_shift = row_weight if SAFE else tl.load(row_shift_ptr + row_place, mask=row_valid, other=0.0)
            row_offset = (p * column_tiles + n).to(tl.int64) * rows + row_index
            column_offset = (p * row_tiles + m).to(tl.int64) * columns
            prefix_weight = tl.load(prefix_weight_ptr + p)
            # Each branch computes all that follows: what both could reach would stay in registers where they meet.
            if has_positive:
                found = _prefix_gradient(
                    products, query_inverse, passage_inverse_ptr + p * passages + first_column, scale, shift,
                    row_weight, column_weight_ptr + p * passages + first_column, row_shift,
                    column_shift_ptr + p * passages + first_column, prefix_weight, query_id_ptr, passage_id_ptr,
                    key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row, first_column, row, column,
                    row_index, row_valid, columns, positive_column, row_along_ptr + row_offset,
                    column_along_ptr + column_offset, BLOCK_M, BLOCK_N, PACKED, SAFE, SYMMETRIC, HAS_IDS, HAS_EXCLUDED,
                    True,
                )  # fmt: skip
            else:
                found = _prefix_gradient(
                    products, query_inverse, passage_inverse_ptr + p * passages + first_column, scale, shift,
                    row_weight, column_weight_ptr + p * passages + first_column, row_shift,
                    column_shift_ptr + p * passages + first_column, prefix_weight, query_id_ptr, passage_id_ptr,
                    key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row, first_column, row, column,
                    row_index, row_valid, columns, positive_column, row_along_ptr + row_offset,
                    column_along_ptr + column_offset, BLOCK_M, BLOCK_N, PACKED, SAFE, SYMMETRIC, HAS_IDS, HAS_EXCLUDED,
                    False,
                )  # fmt: skip
            gradients = gradients + (found,)  # type: ignore[assignment]  # noqa: RUF005
        for half in tl.static_range(2):
            total = tl.zeros((BLOCK_M, BLOCK_N // 2), dtype=tl.float32)
            for back in tl.static_range(len(ENDS)):
                total += _unpack(gradients[len(ENDS) - 1 - back], half, PACKED)
                stored = total
                if PRODUCT == "tf32":
                    # Round to tf32's 10 bits: tensor cores would truncate.
                    stored = ((total.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
                place = [(len(ENDS) - 1 - back) * stride + row, column + half * (BLOCK_N // 2)]
                gradient.store(place, stored.to(gradient.dtype))


@triton.jit
def _prefix_gradient(
    products, query_inverse, passage_inverse_ptr, scale, shift, row_weight, column_weight_ptr, row_shift,
    column_shift_ptr, prefix_weight, query_id_ptr, passage_id_ptr, key_ptr, start_ptr, row_cells, column_cells,
    cell_bits, first_row, first_column, row, column, row_index, row_valid, columns, positive_column, row_along_place,
    column_along_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, SAFE: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """The gradient dS · query_inverse · passage_inverse of one prefix's tile, packed; stores its sums of dS · cos.

    Without POSITIVE the tile contains no positive. The columns are computed in two halves, which takes fewer registers
    at a time.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    halves = tl.split(tl.permute(tl.reshape(products, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    found = ()
    row_along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for half in tl.static_range(2):
        column_index = column + half * HALF + tl.arange(0, HALF)
        column_valid = column_index < columns
        passage_inverse = tl.load(passage_inverse_ptr + column_index, mask=column_valid, other=0.0)
        exponents = _mask(
            halves[half] * passage_inverse[None, :] * (query_inverse * scale)[:, None], query_id_ptr, passage_id_ptr,
            key_ptr, start_ptr, row_cells, column_cells, cell_bits, first_row, first_column, row,
            column + half * HALF, row_index, column_index, row_valid, column_valid, positive_column, BLOCK_M, HALF,
            HAS_IDS, HAS_EXCLUDED,
        )  # fmt: skip
        # The weights are multiplied by the inverse lengths of their side.
        column_weight = passage_inverse
        if SYMMETRIC:
            column_weight *= tl.load(column_weight_ptr + column_index, mask=column_valid, other=0.0)
        if SAFE:
            factor = row_weight[:, None] * passage_inverse[None, :]
            if SYMMETRIC:
                factor += query_inverse[:, None] * column_weight[None, :]
            values = tl.exp2(exponents - shift) * factor
        else:
            values = tl.exp2(exponents - row_shift[:, None]) * row_weight[:, None] * passage_inverse[None, :]
            if SYMMETRIC:
                column_shift = tl.load(column_shift_ptr + column_index, mask=column_valid, other=0.0)
                # Columns that are no positive may have no maximum; the clamp avoids an overflow.
                exponentials = tl.exp2(tl.minimum(exponents - column_shift[None, :], 0.0)) * query_inverse[:, None]
                values += tl.where(column_weight[None, :] != 0, exponentials * column_weight[None, :], 0.0)
        if POSITIVE:
            positive = positive_column[:, None] == column_index[None, :]
            ones = (prefix_weight * query_inverse)[:, None] * passage_inverse[None, :]
            values = tl.where(positive, values - ones, values)
        along = values * halves[half]
        row_along += tl.sum(along, 1)
        tl.store(column_along_ptr + column_index, tl.sum(along, 0), mask=column_valid)
        found = found + (values,)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(row_along_place, row_along, mask=row_valid)
    if PACKED:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [found[1], found[0]],  # type: ignore[misc]
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return found


@triton.jit
def _unpack(found, half: tl.constexpr, PACKED: tl.constexpr):
    """One half of the columns, in float32. Two bf16 numbers are packed in 32 bits: alone each would take a register."""
    if PACKED:
        bits = found << 16 if half == 0 else found & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return found[half]


@triton.jit(do_not_specialize=["first"])
def add_along_kernel(
    along_ptr, sum_ptr, sum_stride, size, tiles, first, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Add the tiles' sums [prefixes, tiles, size] to columns of the gradient sums; program (·, p) those of prefix p.

    `sum_ptr` is the first of these columns. With `first` they are overwritten.
    """
    prefix = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < size
    target_ptr = sum_ptr + index.to(tl.int64) * sum_stride + prefix
    total = tl.load(target_ptr, mask=valid & (first == 0), other=0.0)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        offset = (prefix * tiles + tile).to(tl.int64)[:, None] * size + index[None, :]
        total += tl.sum(tl.load(along_ptr + offset, mask=(tile < tiles)[:, None] & valid[None, :], other=0.0), 0)
    tl.store(target_ptr, total, mask=valid)


@triton.jit(do_not_specialize=["query_first", "passage_first"])
def slice_products_kernel(
    gradient, gradient_transposed, passage, query, query_sum, passage_sum, rows, columns, stride, query_tiles,
    query_first, passage_first,
    STARTS: tl.constexpr, ENDS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add H_n · K[:, slice n] to the sums of the queries and H_nᵀ · Q[:, slice n] to those of the passages.

    Both are in one launch, so that together they fill the multiprocessors. Tiles below `query_tiles` are those of the
    queries. TILES is the number of column tiles of all slices; BLOCK_N divides the slices.
    """
    tile = tl.program_id(0)
    if tile < query_tiles:
        row = tile // TILES * BLOCK_M
        slot, column = _slice_tile(tile % TILES, STARTS, ENDS, BLOCK_N)
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, columns, BLOCK_K):
            products = tl.dot(gradient.load([slot * stride + row, k]), passage.load([k, column]), products)
        if query_first == 0:
            products += query_sum.load([row, column])
        query_sum.store([row, column], products)
    else:
        row = (tile - query_tiles) // TILES * BLOCK_M
        slot, column = _slice_tile((tile - query_tiles) % TILES, STARTS, ENDS, BLOCK_N)
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Rows between the block's end and the stride hold zeros, and the queries end with the block.
        for k in range(0, rows, BLOCK_K):
            products = tl.dot(gradient_transposed.load([slot * stride + k, row]).T, query.load([k, column]), products)
        if passage_first == 0:
            products += passage_sum.load([row, column])
        passage_sum.store([row, column], products)


@triton.jit
def _slice_tile(tile, STARTS: tl.constexpr, ENDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(slice, first column) of a column tile."""
    slot, column, first = 0, 0, 0
    for n in tl.static_range(len(ENDS)):
        inside = (tile >= first) & (tile < first + (ENDS[n] - STARTS[n]) // BLOCK_N)
        slot = tl.where(inside, n, slot)
        column = tl.where(inside, STARTS[n] + (tile - first) * BLOCK_N, column)
        first += (ENDS[n] - STARTS[n]) // BLOCK_N
    return slot, column


@triton.jit
def prefix_epilogue_kernel(
    sum_ptr, sum_stride, side_ptr, inverse_ptr, out_ptr, out_stride, scale_ptr, upstream_ptr, share, rows,
    STARTS: tl.constexpr, OUT_STARTS: tl.constexpr, OUT_ENDS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients from sums: (sum − (Σ_{m ≥ n} e_m · inverse_m²) ∘ row) · logit_scale · upstream · share for slice n.

    OUT_STARTS and OUT_ENDS are the slices in the embeddings, STARTS those in the packed sums, whose columns from WIDTH
    on are the e_m. All three begin with the last slice.
    """
    factor = tl.load(scale_ptr) * tl.load(upstream_ptr).to(tl.float32) * share
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    long_row = row.to(tl.int64)
    along = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for back in tl.static_range(len(OUT_ENDS)):
        n = len(OUT_ENDS) - 1 - back
        inverse = tl.load(inverse_ptr + n * rows + row, mask=valid, other=0.0)
        along += tl.load(sum_ptr + long_row * sum_stride + WIDTH + n, mask=valid, other=0.0) * inverse * inverse
        for d in range(0, OUT_ENDS[back] - OUT_STARTS[back], BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = valid[:, None] & (column < OUT_ENDS[back] - OUT_STARTS[back])[None, :]
            packed = STARTS[back] + column[None, :]
            values = tl.load(sum_ptr + long_row[:, None] * sum_stride + packed, mask=inside, other=0.0)
            own = tl.load(side_ptr + long_row[:, None] * WIDTH + packed, mask=inside, other=0.0).to(tl.float32)
            values = (values - along[:, None] * own) * factor
            target_ptr = out_ptr + long_row[:, None] * out_stride + OUT_STARTS[back] + column[None, :]
            tl.store(target_ptr, values.to(out_ptr.dtype.element_ty), mask=inside)
