"""Backward: gradients of the scores of all prefixes, from tiles that are computed again.

The products are those of kernels/matryoshka/sums.py. For each slice n, a tile of

    H_n = Σ_{m ≥ n} dS_m · query_inverse_m · passage_inverse_m

is written to the workspace, and sums of dS_m · cos over the rows and columns of the tile. The workspace is
[slices · stride, columns]: H_n begins at row n · stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import active_tiles, find_positives, mask_pairs, scale_and_shift, tile_coordinates


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
        exponents = mask_pairs(
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
                # Columns that are not a positive may have no maximum; the clamp avoids an overflow.
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
