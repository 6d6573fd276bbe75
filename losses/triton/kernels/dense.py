"""InfoNCE with the whole score matrix in memory: softmax denominators, loss and dS, one launch each.

    row_sum_i = Σ_j 2^(x_ij − row_shift_i)      column_sum_j = Σ_i 2^(x_ij − column_shift_j)      x = S / log 2

At these sizes a launch costs more than its work, so each kernel does as much as possible between the cuBLAS products.
`products` [M, N] float32 are Q Kᵀ, not yet scaled. `statistics` float32 holds the row sums [M], row shifts [M], column
sums [N] and column shifts [N]. Each program writes its own elements, so results are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losses.triton.kernels.tile import LOG2_E

# A program of `softmax_statistics_kernel` reduces this many rows or columns, this many entries at a time.
ROWS_PER_PROGRAM, ROW_STEP = 8, 512
COLUMNS_PER_PROGRAM, COLUMN_STEP = 32, 128
TILE_M, TILE_N = 32, 128
# Marks an excluded pair in `products`. Infinity would turn sums that must stay finite into NaN.
EXCLUDED = tl.constexpr(-3.4028234663852886e38)
MARK_BLOCK = 256


@triton.jit
def mark_excluded_kernel(
    product_ptr, pair_ptr, positive_ptr, pairs, rows, columns, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Store EXCLUDED at the pairs [R, 2] int64.

    A pair outside the matrix, or of a query and its own positive, makes the loss NaN.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < pairs
    row = tl.load(pair_ptr + 2 * pair, mask=valid, other=0)
    column = tl.load(pair_ptr + 2 * pair + 1, mask=valid, other=0)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    own = row if DIAGONAL else tl.load(positive_ptr + row, mask=valid & inside, other=-1)
    good = inside & (own != column)
    tl.store(product_ptr + row * columns + column, EXCLUDED, mask=valid & good)
    if tl.max((valid & (good == 0)).to(tl.int32), 0) > 0:
        # The entry of the first query's positive, which no valid pair overwrites.
        first = 0
        if not DIAGONAL:
            first = tl.load(positive_ptr)
            first = tl.where((first >= 0) & (first < columns), first, 0)
        tl.store(product_ptr + first, float("nan"))


@triton.jit
def softmax_statistics_kernel(
    product_ptr, scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, statistics_ptr, rows, columns,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    ROW_STEP: tl.constexpr, COLUMNS_PER_PROGRAM: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of exponentials, of rows in programs (·, 0) and of columns in programs (·, 1)."""
    scale = tl.load(scale_ptr) * LOG2_E
    if tl.program_id(1) == 0:
        row = tl.program_id(0) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
        if tl.program_id(0) * ROWS_PER_PROGRAM < rows:
            highest = tl.full((ROWS_PER_PROGRAM,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS_PER_PROGRAM,), dtype=tl.float32)
            worst = tl.zeros((ROWS_PER_PROGRAM,), dtype=tl.float32)
            for first in range(0, columns, ROW_STEP):
                column = first + tl.arange(0, ROW_STEP)
                products, exponents = _exponents(
                    product_ptr, scale, positive_ptr, query_id_ptr, passage_id_ptr, row, column, rows, columns,
                    DIAGONAL, HAS_IDS, HAS_EXCLUDED,
                )  # fmt: skip
                # A score of minus infinity adds zero to every sum; multiplied by zero it gives NaN.
                worst += tl.sum(products * 0.0, 1)
                highest, total = _update_softmax(exponents, highest, total, 1)
            tl.store(statistics_ptr + row, total + worst, mask=row < rows)
            tl.store(statistics_ptr + rows + row, highest, mask=row < rows)
    else:
        column = tl.program_id(0) * COLUMNS_PER_PROGRAM + tl.arange(0, COLUMNS_PER_PROGRAM)
        if tl.program_id(0) * COLUMNS_PER_PROGRAM < columns:
            highest = tl.full((COLUMNS_PER_PROGRAM,), float("-inf"), tl.float32)
            total = tl.zeros((COLUMNS_PER_PROGRAM,), dtype=tl.float32)
            for first in range(0, rows, COLUMN_STEP):
                row = first + tl.arange(0, COLUMN_STEP)
                _, exponents = _exponents(
                    product_ptr, scale, positive_ptr, query_id_ptr, passage_id_ptr, row, column, rows, columns,
                    DIAGONAL, HAS_IDS, HAS_EXCLUDED,
                )  # fmt: skip
                highest, total = _update_softmax(exponents, highest, total, 0)
            tl.store(statistics_ptr + 2 * rows + column, total, mask=column < columns)
            tl.store(statistics_ptr + 2 * rows + columns + column, highest, mask=column < columns)


@triton.jit
def _exponents(
    product_ptr, scale, positive_ptr, query_id_ptr, passage_id_ptr, row, column, rows, columns,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    """A tile of products, zero beyond the matrix, and of exponents of 2, minus infinity beyond it and where masked."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    products = tl.load(product_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    counted = inside
    if HAS_EXCLUDED:
        counted = inside & (products != EXCLUDED)
    exponents = tl.where(counted, products * scale, float("-inf"))
    if HAS_IDS:
        positive_column = _positive_columns(positive_ptr, row, rows, columns, DIAGONAL)
        query_id = tl.load(query_id_ptr + row, mask=row < rows, other=0)
        passage_id = tl.load(passage_id_ptr + column, mask=column < columns, other=0)
        masked = (query_id[:, None] == passage_id[None, :]) & (positive_column[:, None] != column[None, :])
        exponents = tl.where(masked, float("-inf"), exponents)
    return products, exponents


@triton.jit
def _positive_columns(positive_ptr, row, rows, columns, DIAGONAL: tl.constexpr):
    """Columns of the positives; −1 beyond the matrix and for out-of-range positives."""
    if DIAGONAL:
        return tl.where(row < rows, row, -1)
    else:
        positive_column = tl.load(positive_ptr + row, mask=row < rows, other=-1)
        return tl.where(positive_column < columns, tl.maximum(positive_column, -1), -1).to(tl.int32)


@triton.jit
def _update_softmax(exponents, highest, total, axis: tl.constexpr):
    """Online softmax: add a tile to a running maximum and sum. Without any finite exponent the sum is zero."""
    new = tl.maximum(highest, tl.max(exponents, axis))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(exponents - tl.expand_dims(base, axis)), axis)
    return new, total


@triton.jit
def mean_loss_kernel(
    product_ptr, scale_ptr, positive_ptr, statistics_ptr, count_ptr, loss_ptr, summary_ptr, rows,
    columns,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean loss over rows and over their positives' columns, by one program.

    With the counts [3, M] of dense_row_statistics_kernel, also the summary [3]: the share of rank 1, the mean of
    1 / rank, the share of masked entries.
    """
    scale = tl.load(scale_ptr) * LOG2_E
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first_ranks = tl.zeros((BLOCK,), dtype=tl.float32)
    reciprocals = tl.zeros((BLOCK,), dtype=tl.float32)
    masked = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        valid = row < rows
        if HAS_COUNTS:
            rank = tl.load(count_ptr + row, mask=valid, other=1)
            first_ranks += (valid & (rank == 1)).to(tl.float32)
            reciprocals += tl.where(valid, 1.0 / rank.to(tl.float32), 0.0)
            masked += tl.load(count_ptr + 2 * rows + row, mask=valid, other=0).to(tl.float32) / columns
        positive_column = _positive_columns(positive_ptr, row, rows, columns, DIAGONAL)
        known = positive_column >= 0
        score = (
            tl.load(product_ptr + row.to(tl.int64) * columns + positive_column, mask=valid & known, other=0.0) * scale
        )
        loss = _negative_log_probability(score, statistics_ptr + row, statistics_ptr + rows + row, valid)
        if SYMMETRIC:
            column_ptr = statistics_ptr + 2 * rows + positive_column
            loss = (loss + _negative_log_probability(score, column_ptr, column_ptr + columns, valid & known)) * 0.5
        # An out-of-range positive, which is not checked on the host for GPU tensors.
        total += tl.where(valid & (known == 0), float("nan"), loss)
    tl.store(loss_ptr, tl.sum(total, 0) / (rows * LOG2_E))
    if HAS_COUNTS:
        tl.store(summary_ptr, tl.sum(first_ranks, 0) / rows)
        tl.store(summary_ptr + 1, tl.sum(reciprocals, 0) / rows)
        tl.store(summary_ptr + 2, tl.sum(masked, 0) / rows)


@triton.jit
def _negative_log_probability(score, sum_ptr, shift_ptr, valid):
    total = tl.load(sum_ptr, mask=valid, other=1.0)
    return tl.log2(total) + (tl.load(shift_ptr, mask=valid, other=0.0) - score)


@triton.jit
def dense_row_statistics_kernel(
    product_ptr, scale_ptr, positive_ptr, query_id_ptr, passage_id_ptr, statistics_ptr, count_ptr, number_ptr, rows,
    columns,
    DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    ROW_STEP: tl.constexpr,
):  # fmt: skip
    """Rank, row of the hardest negative and number of masked entries [3, M] int64; its score and the entropy [2, M]."""
    scale = tl.load(scale_ptr) * LOG2_E
    row = tl.program_id(0) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    valid = row < rows
    positive_column = _positive_columns(positive_ptr, row, rows, columns, DIAGONAL)
    known = valid & (positive_column >= 0)
    own = tl.load(product_ptr + row.to(tl.int64) * columns + positive_column, mask=known, other=0.0) * scale
    total = tl.load(statistics_ptr + row, mask=valid, other=1.0)
    shift = tl.load(statistics_ptr + rows + row, mask=valid, other=0.0)
    higher = tl.zeros((ROWS_PER_PROGRAM,), dtype=tl.int32)
    counted = tl.zeros((ROWS_PER_PROGRAM,), dtype=tl.int32)
    hardest = tl.full((ROWS_PER_PROGRAM,), -1, tl.int32)
    best = tl.full((ROWS_PER_PROGRAM,), float("-inf"), tl.float32)
    weighted = tl.zeros((ROWS_PER_PROGRAM,), dtype=tl.float32)
    for first in range(0, columns, ROW_STEP):
        column = first + tl.arange(0, ROW_STEP)
        _, exponents = _exponents(
            product_ptr, scale, positive_ptr, query_id_ptr, passage_id_ptr, row, column, rows, columns,
            DIAGONAL, HAS_IDS, HAS_EXCLUDED,
        )  # fmt: skip
        shifted = exponents - shift[:, None]
        # A masked exponent is minus infinity, and zero times it would be NaN.
        weighted += tl.sum(tl.exp2(shifted) * tl.maximum(shifted, -3.0e38), 1)
        exponents = tl.where(positive_column[:, None] == column[None, :], float("-inf"), exponents)
        higher += tl.sum((exponents > own[:, None]).to(tl.int32), 1)
        counted += tl.sum((exponents > float("-inf")).to(tl.int32), 1)
        highest = tl.max(exponents, 1)
        place = tl.min(tl.where(exponents == highest[:, None], column[None, :], 2147483647), 1)
        hardest = tl.where(highest > best, place, hardest)
        best = tl.maximum(best, highest)
    tl.store(count_ptr + row, (higher + 1).to(tl.int64), mask=valid)
    tl.store(count_ptr + rows + row, hardest.to(tl.int64), mask=valid)
    tl.store(count_ptr + 2 * rows + row, (columns - 1 - counted).to(tl.int64), mask=valid)
    tl.store(number_ptr + row, best / LOG2_E, mask=valid)
    tl.store(number_ptr + rows + row, tl.maximum(tl.log2(total) - weighted / total, 0.0) / LOG2_E, mask=valid)


@triton.jit
def dense_gradient_kernel(
    product_ptr, scale_ptr, upstream_ptr, positive_ptr, positive_count_ptr, query_id_ptr, passage_id_ptr,
    statistics_ptr, gradient_ptr, partial_ptr, rows, columns,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr, HAS_IDS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """logit_scale · upstream · dS in the operand dtype, and each program's part of Σ dS ∘ (Q Kᵀ) · upstream."""
    logit_scale = tl.load(scale_ptr)
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    row_valid, column_valid = row < rows, column < columns
    products, exponents = _exponents(
        product_ptr, logit_scale * LOG2_E, positive_ptr, query_id_ptr, passage_id_ptr, row, column, rows, columns,
        DIAGONAL, HAS_IDS, HAS_EXCLUDED,
    )  # fmt: skip
    half = 0.5 if SYMMETRIC else 1.0
    row_weight = half / tl.load(statistics_ptr + row, mask=row_valid, other=1.0)
    row_shift = tl.load(statistics_ptr + rows + row, mask=row_valid, other=0.0)
    values = tl.exp2(exponents - row_shift[:, None]) * row_weight[:, None]
    if SYMMETRIC:
        if DIAGONAL:
            positive_count = (column < rows).to(tl.float32)
        else:
            positive_count = tl.load(positive_count_ptr + column, mask=column_valid, other=0.0)
        is_positive = column_valid & (positive_count > 0)
        column_weight = half * positive_count / tl.load(statistics_ptr + 2 * rows + column, mask=is_positive, other=1.0)
        column_shift = tl.load(statistics_ptr + 2 * rows + columns + column, mask=is_positive, other=0.0)
        # A column that is not a positive may be fully masked; it has weight zero.
        exponentials = tl.exp2(tl.where(is_positive[None, :], exponents - column_shift[None, :], float("-inf")))
        values += exponentials * column_weight[None, :]
    positive_column = _positive_columns(positive_ptr, row, rows, columns, DIAGONAL)
    values = tl.where(positive_column[:, None] == column[None, :], values - 1.0, values)
    values *= tl.load(upstream_ptr) / rows
    inside = row_valid[:, None] & column_valid[None, :]
    partial = tl.sum(tl.sum(tl.where(inside, values * products, 0.0), 1), 0)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), partial)
    target = gradient_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(target, (values * logit_scale).to(gradient_ptr.dtype.element_ty), mask=inside)
