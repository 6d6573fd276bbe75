"""Bounds of the scores, from one pass over queries, passages and positive pairs.

bounds [4] float32, initially zero: max ‖q‖², max ‖k‖², max(0, −lowest positive score), and 1 if a value is not finite
or a positive is out of range. The kernels use them on the device, without the host, to decide whether one shift is
safe for all exponentials and whether the loss is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 32
BLOCK_D = 128


@triton.jit
def bounds_kernel(
    query_ptr, passage_ptr, positive_ptr, scale_ptr, bounds_ptr, queries, passages, query_blocks,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    largest = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    if block < query_blocks:
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = rows < queries
        positive = tl.load(positive_ptr + rows, mask=valid, other=0)
        known = (positive >= 0) & (positive < passages)
        product = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = valid[:, None] & (d + columns < D)[None, :]
            offsets = (d + columns)[None, :]
            query = tl.load(query_ptr + rows.to(tl.int64)[:, None] * D + offsets, mask=inside, other=0).to(tl.float32)
            own = inside & known[:, None]
            passage = tl.load(passage_ptr + positive[:, None] * D + offsets, mask=own, other=0).to(tl.float32)
            squares += tl.sum(query * query, 1)
            product += tl.sum(query * passage, 1)
            largest = tl.maximum(largest, tl.max(tl.where(query == query, tl.abs(query), float("inf")), 1))
        largest = tl.where(known, largest, float("inf"))
        _atomic_maximum(bounds_ptr + 2, -product * tl.load(scale_ptr))
        _atomic_maximum(bounds_ptr, squares)
    else:
        rows = (block - query_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = rows < passages
        for d in range(0, D, BLOCK_D):
            inside = valid[:, None] & (d + columns < D)[None, :]
            offsets = rows.to(tl.int64)[:, None] * D + (d + columns)[None, :]
            passage = tl.load(passage_ptr + offsets, mask=inside, other=0).to(tl.float32)
            squares += tl.sum(passage * passage, 1)
            largest = tl.maximum(largest, tl.max(tl.where(passage == passage, tl.abs(passage), float("inf")), 1))
        _atomic_maximum(bounds_ptr + 1, squares)
    _atomic_maximum(bounds_ptr + 3, tl.where(largest < float("inf"), 0.0, 1.0))


@triton.jit
def _atomic_maximum(target_ptr, values):
    """Raise a non-negative number to the maximum of the values; NaN counts as infinity."""
    highest = tl.max(tl.where(values == values, tl.maximum(values, 0.0), float("inf")), 0)
    # Non-negative floats are ordered as their bits.
    tl.atomic_max(target_ptr.to(tl.pointer_type(tl.int32)), highest.to(tl.int32, bitcast=True), sem="relaxed")


def measure_bounds(query: Tensor, passage: Tensor, positive: Tensor, logit_scale: Tensor, bounds: Tensor) -> None:
    """Fill bounds [4] float32, initially zero, for contiguous query [M, D] and passage [N, D]."""
    (queries, dim), passages = query.shape, passage.shape[0]
    query_blocks = triton.cdiv(queries, BLOCK_ROWS)
    bounds_kernel[(query_blocks + triton.cdiv(passages, BLOCK_ROWS),)](
        query, passage, positive, logit_scale, bounds, queries, passages, query_blocks,
        D=dim, BLOCK_ROWS=BLOCK_ROWS, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
