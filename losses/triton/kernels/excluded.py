"""Excluded pairs (query row, passage row), sorted so that a tile finds the pairs it contains.

The score matrix is divided into cells of CELL_ROWS rows by 2^cell_bits columns, numbered row by row. Each pair becomes
a 64-bit key: its cell, its row in the cell, its column in the cell. The sorted keys and the first key of each cell
form a sparse matrix, compressed by cells. A tile reads the keys of its own cells, which is none for most tiles. Memory
is 8 bytes per pair and at most 16 bytes per row and column of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from losses.triton.kernels.tile import CELL_ROW_BITS, CELL_ROWS

# Sorts after all keys; for pairs outside the block of passages.
OUTSIDE = tl.constexpr(2**63 - 1)
BLOCK = 1024
MIN_CELL_BITS = 7
MAX_CELLS_PER_EMBEDDING = 4


@dataclass(frozen=True)
class Cells:
    """Division of a score matrix into cells."""

    row_cells: int
    """Cells along the rows of the matrix."""
    column_cells: int
    """Cells along the columns of the matrix."""
    cell_bits: int
    """A cell has 2^cell_bits columns."""

    @classmethod
    def of(cls, queries: int, passages: int) -> Cells:
        """The narrowest cells of at least 128 columns whose number is linear in the batch size."""
        row_cells = triton.cdiv(queries, CELL_ROWS.value)
        cell_bits = MIN_CELL_BITS
        while row_cells * triton.cdiv(passages, 1 << cell_bits) > MAX_CELLS_PER_EMBEDDING * (queries + passages):
            cell_bits += 1
        return cls(row_cells, triton.cdiv(passages, 1 << cell_bits), cell_bits)


def sorted_pairs(
    pairs: Tensor, queries: int, passages: int, *, first: int = 0, positive: Tensor | None = None,
    diagonal: bool = False, bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sort pairs [R, 2] int64, R ≥ 1, for a score matrix [queries, passages] with at least one of each.

    Args:
        first: Row of the pool at which these passages begin; pairs with passages outside them are dropped.
        positive: [M] int64 rows of the positives; not read if `diagonal`.
        diagonal: Whether the positives are 0, …, M − 1.
        bounds: [4] of triton/kernels/bounds.py; the last is set to 1 if a pair is outside the matrix or is a query and
            its own positive. None if the pairs have been checked.

    Returns:
        Keys [R] int64, and [cells + 1] int32, the cell_row of the first key of each cell.
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
        # Non-negative floats are ordered as their bits.
        worst = tl.max(wrong.to(tl.float32), 0)
        tl.atomic_max(bounds_ptr.to(tl.pointer_type(tl.int32)) + 3, worst.to(tl.int32, bitcast=True), sem="relaxed")
    column_cell = column >> cell_bits
    cell = (row >> CELL_ROW_BITS) * column_cells + column_cell
    cell_row = cell * CELL_ROWS + (row & (CELL_ROWS - 1))
    key = (cell_row << cell_bits) + (column - (column_cell << cell_bits))
    tl.store(key_ptr + pair, tl.where(inside, key, OUTSIDE), mask=valid)
