"""What forward over ranks collects: the softmax of each row here, and of the columns of a block that visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losses.block_tiles import BlockTiles, PassageBlock, Softmax
from losses.chunked import negative_log_share


@dataclass(frozen=True)
class ColumnSums:
    """Of n passages, as one tensor [4, n] that travels: the softmax over queries (shift and sum), how many queries
    own each passage as their positive, and the sum of those queries' scores with it."""

    table: Tensor

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.table[0], self.table[1])

    @property
    def owners(self) -> Tensor:
        return self.table[2]

    def loss(self, natural: float) -> Tensor:
        """0-dim float64: the column losses of all owners."""
        shift, total, owners, scores = self.table
        mean_score = scores / owners.clamp(min=1)
        losses = negative_log_share(mean_score * natural, shift * natural, total)
        return torch.where(owners > 0, owners * losses, 0).sum(dtype=torch.float64)


def merge(one: ColumnSums, other: ColumnSums, natural: float) -> ColumnSums:
    """The sums over the queries of both."""
    shift = torch.maximum(one.table[0], other.table[0])
    # A column that everybody masks has no maximum, and must not become the difference of two infinities.
    base = torch.where(shift == -torch.inf, 0, shift)
    totals = [sums.table[1] * ((sums.table[0] - base) * natural).exp() for sums in (one, other)]
    return ColumnSums(torch.stack([shift, totals[0] + totals[1], *(one.table[2:] + other.table[2:])]))


@dataclass(frozen=True)
class Visited:
    """This rank's rows with all blocks met so far, and the last of these with its columns."""

    score: Tensor
    rows: Softmax
    block: PassageBlock
    columns: ColumnSums

    @classmethod
    def begun(cls, tiles: BlockTiles, own: PassageBlock) -> Visited:
        rows = tiles.no_sums(len(tiles.query))
        return cls(torch.zeros_like(rows.total), rows, own, ColumnSums(rows.total.new_empty(4, 0)))

    def now_at(self, block: PassageBlock, columns: ColumnSums) -> Visited:
        return replace(self, block=block, columns=columns)

    def meet(self, tiles: BlockTiles, block: PassageBlock, positive: Tensor) -> ColumnSums:
        """Add a block to the rows, in place; returns what these queries give to its columns."""
        columns, rows = tiles.no_sums(len(block.passage)), len(block.passage)
        if len(self.score) and rows:
            tiles.add_sums(block, self.score, self.rows, columns)
        table = torch.stack([columns.shift, columns.total, *columns.total.new_zeros(2, rows)])
        if len(self.score) and rows:
            place = positive - block.first
            inside = ((place >= 0) & (place < rows)).to(table.dtype)
            place = place.clamp(0, rows - 1)
            table[2].index_add_(0, place, inside)
            table[3].index_add_(0, place, self.score * inside)
        return ColumnSums(table)

    def row_loss(self, natural: float) -> Tensor:
        """0-dim float64: the row losses of this rank's queries."""
        losses = negative_log_share(self.score * natural, self.rows.shift * natural, self.rows.total)
        return losses.sum(dtype=torch.float64)
