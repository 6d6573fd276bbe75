"""State of forward over ranks: softmax sums of this rank's rows, and of the columns of the current block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from losses.distributed.blocks import BlockBackend, ColumnSums, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch


@dataclass(frozen=True)
class ForwardState:
    """Row sums of this rank over all blocks so far, and the last block with its column sums."""

    rows: RowSums
    first_passage: int
    own: PassageBlock
    block: PassageBlock
    columns: ColumnSums

    @classmethod
    def initial(cls, backend: BlockBackend, first_passage: int, own: PassageBlock) -> ForwardState:
        """State before the first block; this rank's passages begin at row `first_passage` of the pool."""
        rows = RowSums(backend.initial_sums(backend.row_kinds, len(backend.query)))
        return cls(rows, first_passage, own, own, ColumnSums(rows.table.new_empty(4, *rows.table.shape[1:-1], 0)))

    def with_columns(self, block: PassageBlock, columns: ColumnSums) -> ForwardState:
        """A copy with another current block and its column sums."""
        return replace(self, block=block, columns=columns)

    def add_block(self, backend: BlockBackend, block: PassageBlock, batch: ContrastiveBatch) -> ColumnSums:
        """Add a block to the row sums, in place; returns the column sums over this rank's queries."""
        queries, passages = self.rows.table.shape[-1], len(block.passage)
        columns = ColumnSums(backend.initial_sums(4, passages))
        if not queries or not passages:
            return columns
        backend.accumulate_sums(block, self.rows, columns)
        if batch.symmetric and batch.options is None:
            self._add_positives(columns, block, batch)
        return columns

    def _add_positives(self, columns: ColumnSums, block: PassageBlock, batch: ContrastiveBatch) -> None:
        """Count, for each passage of the block, the queries whose positive it is, and sum their scores."""
        _, _, positive_count, scores = columns.table
        if batch.diagonal:
            # The positives are this rank's passages in order; the block holds all of them or none.
            first, queries = self.first_passage - block.first, self.rows.table.shape[-1]
            if 0 <= first < len(block.passage):
                positive_count[..., first : first + queries] = 1
                scores[..., first : first + queries] = self.rows.score
            return
        column = batch.positive - block.first
        inside = ((column >= 0) & (column < len(block.passage))).to(positive_count.dtype)
        column = column.clamp(0, len(block.passage) - 1)
        positive_count.index_add_(-1, column, inside.expand_as(self.rows.score))
        scores.index_add_(-1, column, self.rows.score * inside)
