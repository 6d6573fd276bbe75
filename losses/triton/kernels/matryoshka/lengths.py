"""Lengths of the prefixes of the embeddings, and a bound of their scores.

The columns of the operands are packed: each slice, the columns that a prefix adds to the previous one, begins at a
multiple of the step of the product and is padded with zeros. STARTS and ENDS are the slices in the packed operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
