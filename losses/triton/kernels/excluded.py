"""Excluded pairs (query row, passage row) in the order in which tiles of the score matrix need them.

The matrix is cut into cells of CELL_ROWS rows by 2^cell_bits columns, counted row by row. Each pair becomes one
64-bit key: its cell, then its row and its column within the cell. The sorted keys and the first key of each cell make a
sparse matrix in compressed form. A tile reads the keys of its own cells, on most tiles none. Memory is 8 bytes a pair
and at most 16 bytes a row and a column of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from losses.triton.kernels.tile import CELL_ROW_BITS, CELL_ROWS

# Sorts behind every key, for pairs that lie outside the block of passages.
OUTSIDE = tl.constexpr(2**63 - 1)
BLOCK = 1024
MIN_CELL_BITS = 7
MAX_CELLS_PER_EMBEDDING = 4


@dataclass(frozen=True)
class Cells:
    """How a score matrix is cut into cells."""

    row_cells: int
    """Cells in a column of cells."""
    column_cells: int
    """Cells in a row of cells."""
    cell_bits: int
    """A cell has 2^cell_bits columns."""

    @classmethod
    def of(cls, queries: int, passages: int) -> Cells:
        """The narrowest cells of at least 128 columns whose number is linear in the size of the batch."""
        row_cells = triton.cdiv(queries, CELL_ROWS.value)
        cell_bits = MIN_CELL_BITS
        while row_cells * triton.cdiv(passages, 1 << cell_bits) > MAX_CELLS_PER_EMBEDDING * (queries + passages):
            cell_bits += 1
        return cls(row_cells, triton.cdiv(passages, 1 << cell_bits), cell_bits)


def sorted_pairs(
    pairs: Tensor, queries: int, passages: int, *, first: int = 0, positive: Tensor | None = None,
    diagonal: bool = False, bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sort pairs [R, 2] int64, R ≥ 1, for a matrix of `queries` rows and `passages` columns, at least one of each.

    Args:
        first: row of the pool at which these passages begin; pairs with passages outside them are left out.
        positive: [M] int64 rows of the positives, where `diagonal` does not say that they are 0 … M−1.
        bounds: [4] of triton/kernels/bounds.py; the last becomes 1 where a pair lies outside the matrix or is a query's
            own positive. None where that has been checked.

    Returns:
        keys [R] int64, and starts [cells + 1] int32, where the keys of each cell begin.
    """
    cells = Cells.of(queries, passages)
    keys = torch.empty(len(pairs), dtype=torch.int64, device=pairs.device)
    _pair_keys_kernel[(triton.cdiv(len(pairs), BLOCK),)](
        pairs, pairs if positive is None else positive, pairs if bounds is None else bounds, keys, len(pairs), queries,
        passages, first, cells.column_cells, cells.cell_bits,
        DIAGONAL=diagonal, CHECK=bounds is not None, BLOCK=BLOCK,
    )  # fmt: skip
    keys = keys.sort().values
    size = CELL_ROWS.value << cells.cell_bits
    first_keys = torch.arange(0, (cells.row_cells * cells.column_cells + 1) * size, size, device=pairs.device)
    return keys, torch.searchsorted(keys, first_keys, out_int32=True)


@triton.jit
def _pair_keys_kernel(
    pair_ptr, positive_ptr, bounds_ptr, key_ptr, pairs, queries, passages, first, column_cells, cell_bits,
    DIAGONAL: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < pairs
    row = tl.load(pair_ptr + 2 * pair.to(tl.int64), mask=valid, other=0)
    column = tl.load(pair_ptr + 2 * pair.to(tl.int64) + 1, mask=valid, other=0) - first
    inside = (row >= 0) & (row < queries) & (column >= 0) & (column < passages)
    if CHECK:
        own = row if DIAGONAL else tl.load(positive_ptr + row, mask=valid & inside, other=-1)
        wrong = valid & ((inside == 0) | (own == column))
        inside &= own != column
        # The bits of non-negative numbers are ordered as the numbers are.
        worst = tl.max(wrong.to(tl.float32), 0)
        tl.atomic_max(bounds_ptr.to(tl.pointer_type(tl.int32)) + 3, worst.to(tl.int32, bitcast=True), sem="relaxed")
    column_cell = column >> cell_bits
    cell = (row >> CELL_ROW_BITS) * column_cells + column_cell
    index = cell * CELL_ROWS + (row & (CELL_ROWS - 1))
    key = (index << cell_bits) + (column - (column_cell << cell_bits))
    tl.store(key_ptr + pair, tl.where(inside, key, OUTSIDE), mask=valid)
