"""What forward over ranks collects: the sums of each row here, and of the columns of a block that visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from losses.distributed.blocks import BlockBackend, ColumnSums, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch


@dataclass(frozen=True)
class ForwardState:
    """This rank's rows with all blocks met so far, and the last of these with its columns."""

    rows: RowSums
    own: PassageBlock
    block: PassageBlock
    columns: ColumnSums

    @classmethod
    def initial(cls, backend: BlockBackend, own: PassageBlock) -> ForwardState:
        rows = RowSums(backend.initial_sums(3, len(backend.query)))
        return cls(rows, own, own, ColumnSums(rows.table.new_empty(4, 0)))

    def with_columns(self, block: PassageBlock, columns: ColumnSums) -> ForwardState:
        return replace(self, block=block, columns=columns)

    def add_block(self, backend: BlockBackend, block: PassageBlock, batch: ContrastiveBatch) -> ColumnSums:
        """Add a block to the rows, in column; returns what these queries give to its columns."""
        queries, passages = len(self.rows.score), len(block.passage)
        columns = ColumnSums(backend.initial_sums(4, passages))
        if not queries or not passages:
            return columns
        backend.accumulate_sums(block, self.rows, columns)
        if batch.symmetric:
            self._add_positives(columns, block, batch)
        return columns

    def _add_positives(self, columns: ColumnSums, block: PassageBlock, batch: ContrastiveBatch) -> None:
        """Count the positive_count among these queries and add up their scores."""
        _, _, positive_count, scores = columns.table
        if batch.diagonal:
            # Positives are the own shard's rows in order: in no other, or in these rows of the pool.
            first, queries = self.own.first - block.first, len(self.rows.score)
            if 0 <= first < len(block.passage):
                positive_count[first : first + queries] = 1
                scores[first : first + queries] = self.rows.score
            return
        column = batch.positive - block.first
        inside = ((column >= 0) & (column < len(block.passage))).to(positive_count.dtype)
        column = column.clamp(0, len(block.passage) - 1)
        positive_count.index_add_(0, column, inside)
        scores.index_add_(0, column, self.rows.score * inside)
