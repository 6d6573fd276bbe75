"""What forward over ranks collects: the sums of each row here, and of the columns of a block that visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from losses.distributed.blocks import BlockTiles, ColumnSums, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch


@dataclass(frozen=True)
class ForwardState:
    """This rank's rows with all blocks met so far, and the last of these with its columns."""

    rows: RowSums
    own: PassageBlock
    block: PassageBlock
    columns: ColumnSums

    @classmethod
    def begun(cls, tiles: BlockTiles, own: PassageBlock) -> ForwardState:
        rows = RowSums(tiles.no_sums(3, len(tiles.query)))
        return cls(rows, own, own, ColumnSums(rows.table.new_empty(4, 0)))

    def now_at(self, block: PassageBlock, columns: ColumnSums) -> ForwardState:
        return replace(self, block=block, columns=columns)

    def meet(self, tiles: BlockTiles, block: PassageBlock, batch: ContrastiveBatch) -> ColumnSums:
        """Add a block to the rows, in place; returns what these queries give to its columns."""
        queries, passages = len(self.rows.score), len(block.passage)
        columns = ColumnSums(tiles.no_sums(4, passages))
        if not queries or not passages:
            return columns
        tiles.add_sums(block, self.rows, columns)
        if batch.symmetric:
            self._own(columns, block, batch)
        return columns

    def _own(self, columns: ColumnSums, block: PassageBlock, batch: ContrastiveBatch) -> None:
        """Count the owners among these queries and add up their scores."""
        _, _, owners, scores = columns.table
        if batch.diagonal:
            # Positives are the own shard's rows in order: in no other, or in these rows of the pool.
            first, queries = self.own.first - block.first, len(self.rows.score)
            if 0 <= first < len(block.passage):
                owners[first : first + queries] = 1
                scores[first : first + queries] = self.rows.score
            return
        place = batch.positive - block.first
        inside = ((place >= 0) & (place < len(block.passage))).to(owners.dtype)
        place = place.clamp(0, len(block.passage) - 1)
        owners.index_add_(0, place, inside)
        scores.index_add_(0, place, self.rows.score * inside)
