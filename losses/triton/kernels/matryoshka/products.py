"""Backward: products of H_n (kernels/matryoshka/gradients.py) with the slices, and gradients of the embeddings."""

from __future__ import annotations

import triton
import triton.language as tl


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
