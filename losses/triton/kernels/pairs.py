"""Products of listed pairs of rows, and derivatives written into blocks of dS at listed pairs."""

from __future__ import annotations

import triton
import triton.language as tl

# Pairs of a program of `pair_products_kernel`: a tile large enough for the instructions of the tile kernels.
PRODUCT_BLOCK, PRODUCT_BLOCK_INTERPRETED = 64, 16
WRITE_BLOCK = 1024


@triton.jit
def pair_products_kernel(
    query_ptr, passage_ptr, row_ptr, column_ptr, product_ptr, pairs, passages,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Store the products of the pairs whose column is one of the passages.

    A product is the diagonal entry of a tile, so that it has the same bits as the entry in a tile of scores: a passage
    equal to the positive is then not above its score. The other entries of the tile cost less than a pass over M · D.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < pairs
    row = tl.load(row_ptr + pair, mask=valid, other=0)
    column = tl.load(column_ptr + pair, mask=valid, other=-1)
    inside = valid & (column >= 0) & (column < passages)
    products = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for d in range(0, D, BLOCK_K):
        k = d + tl.arange(0, BLOCK_K)
        loaded = inside[:, None] & (k < D)[None, :]
        query = tl.load(query_ptr + row[:, None] * D + k[None, :], mask=loaded, other=0.0)
        passage = tl.load(passage_ptr + column[:, None] * D + k[None, :], mask=loaded, other=0.0)
        products = tl.dot(query, passage.T, products, input_precision=PRODUCT)
    diagonal = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    tl.store(product_ptr + pair, tl.sum(tl.where(diagonal, products, 0.0), 1), mask=inside)


@triton.jit
def write_pair_gradients_kernel(
    gradient_ptr, row_ptr, column_ptr, value_ptr, pairs, first_row, rows, first_column, columns, stride,
    PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of the pairs inside the block [rows, columns] of the gradient; equal pairs have equal values."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < pairs
    row = tl.load(row_ptr + pair, mask=valid, other=-1) - first_row
    column = tl.load(column_ptr + pair, mask=valid, other=-1) - first_column
    inside = valid & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    values = tl.load(value_ptr + pair, mask=inside, other=0.0)
    if PRODUCT == "tf32":
        # Round to tf32's 10 bits: tensor cores would truncate.
        values = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    tl.store(gradient_ptr + row * stride + column, values.to(gradient_ptr.dtype.element_ty), mask=inside)
