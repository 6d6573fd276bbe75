"""The tiles of one rank's queries with any block of passages, by Triton kernels (triton/inf_cl.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from losses.distributed.blocks import ColumnSums, LineWeights, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch, all_finite
from losses.precision import Precision, add_product
from losses.triton.block_launches import State, Weights, add_sums, score_gradient
from losses.triton.kernel_batch import BlockRun, Finish, cells, padded_to_16_bytes, ranked, sorted_excluded, unit_of

LINES = 1024


class FusedBlocks:
    """`block_tiles.BlockTiles`; exponents are of 2, and the vendor's products add blocks of dS to the sums."""

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, first_passage: int) -> None:
        self.precision, self.workspace_bytes = precision, workspace_bytes
        self._first_passage, self._dimensions = first_passage, batch.query.shape[1]
        self.query = self.operand(batch.query)
        # The kernels read operands alone, and embeddings that wait on the host need not be here too until backward.
        self.batch = replace(batch, query=self.query, passage=self.query[:0])
        self.width = self.query.shape[1]
        self._bounds = torch.empty(0)
        self._elsewhere = False

    def operand(self, passage: Tensor) -> Tensor:
        from losses.triton.launch import operand

        return operand(passage, self.precision)

    def bounds(self, own: PassageBlock, positives_here: bool) -> Tensor:
        from losses.triton.kernels.bounds import measure_bounds

        batch, bounds = self.batch, torch.zeros(4, device=self.query.device)
        self._elsewhere = not positives_here
        if len(self.query) and len(own.passage):
            place = batch.positive - own.first
            if self._elsewhere:
                place = place.clamp(0, len(own.passage) - 1)
            measure_bounds(self.query, own.passage, place, batch.logit_scale, bounds)
        for side, squared in ((self.query, bounds[0]), (own.passage, bounds[1])):
            if len(side) and not (len(self.query) and len(own.passage)):
                squared += torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() ** 2
                bounds[3] = (~all_finite(side)).float()
        if self._elsewhere and len(self.query):
            bounds[2] = torch.inf
        return bounds

    def settle(self, bounds: Tensor) -> None:
        if self._elsewhere:
            # No positive's score is lower than minus the largest that any score may have.
            highest = bounds[0].sqrt() * bounds[1].sqrt() * self.batch.logit_scale.abs()
            bounds[2] = torch.minimum(bounds[2], highest)
        self._bounds = bounds

    def no_sums(self, kinds: int, lines: int) -> Tensor:
        table = self.query.new_zeros(kinds, lines, dtype=torch.float32)
        if not len(self.query):
            # To the kernels a total of zero is one without any sum yet; these none will see.
            table[0] = torch.finfo(torch.float32).min
        return table

    def add_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        batch = self.batch
        state = State(self._bounds, rows.score, rows.total, rows.shift, columns.total, columns.shift)
        place, diagonal = self._place(block)
        add_sums(self._run(block), state, batch.logit_scale, place, batch.symmetric, diagonal, self.workspace_bytes)

    def merge(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        from losses.triton.kernels.partial_sums import merge_kernel

        columns = len(one.shift)
        if columns:
            merge_kernel[(_programs(columns),)](one.table, other.table, columns, BLOCK=LINES)
        return one

    def lower(self, columns: ColumnSums, before: Tensor) -> None:
        from losses.triton.kernels.partial_sums import lower_kernel

        lower_kernel[(_programs(len(before)),)](columns.table, before, len(before), BLOCK=LINES)

    def loss(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        from losses.triton.kernels.partial_sums import line_loss_kernel

        table = rows.table if columns is None else columns.table
        queries, passages = len(rows.score), table.shape[1]
        shares = rows.table.new_empty(_programs(max(queries, passages)))
        if len(shares):
            line_loss_kernel[(len(shares),)](
                self._bounds,
                rows.shift,
                rows.total,
                rows.score,
                table,
                table.stride(0),
                shares,
                queries,
                passages,
                SYMMETRIC=columns is not None,
                BLOCK=LINES,
            )
        return shares.sum(dtype=torch.float64)

    def unit(self, owners: Tensor | None) -> Tensor:
        return unit_of(self.query.dtype, owners, self._bounds)

    def line_weights(self, rows: RowSums, columns: ColumnSums | None, unit: Tensor) -> LineWeights:
        from losses.triton.kernels.gradients import weights_kernel

        # Without columns nobody reads what stands for theirs.
        table = rows.table if columns is None else columns.table
        row, column = torch.empty_like(rows.total), torch.empty_like(table[1])
        lines = max(len(row), len(column))
        if lines:
            weights_kernel[(_programs(lines),)](
                unit,
                table[2],
                rows.total,
                table[1],
                row,
                column,
                len(row),
                len(column),
                SYMMETRIC=columns is not None,
                DIAGONAL=False,
                BLOCK=LINES,
            )
        return LineWeights(row, None if columns is None else column, unit)

    def add_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: LineWeights,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
        first: bool,
    ) -> None:
        from losses.triton.block_sizes import spans

        batch, run = self.batch, self._run(block)
        place, diagonal = self._place(block)
        of_columns = weights.row if weights.column is None else weights.column
        state = State(self._bounds, rows.score, rows.total, rows.shift, column_shift, column_shift)
        kernel_weights = Weights(weights.unit, weights.row, of_columns, batch.symmetric, diagonal)
        blocks = run.blocks
        workspace = run.query.new_empty(blocks.rows * padded_to_16_bytes(blocks.columns, run.dtype))
        for some in spans(0, len(run.query), blocks.rows):
            for columns in spans(0, len(run.passage), blocks.columns):
                height, width = cells(some), cells(columns)
                stride = padded_to_16_bytes(width, run.dtype)
                gradient = workspace[: height * stride].view(height, stride)[:, :width]
                score_gradient(run, state, kernel_weights, batch.logit_scale, place, some, columns, gradient)
                if query_sum is not None:
                    add_product(query_sum[some], gradient, run.passage[columns], first=first and not columns.start)
                if passage_sum is not None:
                    add_product(passage_sum[columns], gradient.T, run.query[some], first=not some.start)

    def gradient(
        self, sums: Tensor, unit: Tensor, upstream: Tensor, share: float, dtype: torch.dtype | None, scale: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        out = sums
        if dtype is not None and (dtype != torch.float32 or self.width != self._dimensions):
            out = sums.new_empty(len(sums), self._dimensions, dtype=dtype)
        if not len(sums):
            return None if dtype is None else out, sums.new_zeros(()) if scale else None
        finish = Finish(self.width, self.batch.logit_scale, unit, upstream, 1 / share)
        shares = finish(sums, self.query, out, scale)
        return None if dtype is None else out, shares.sum() if scale else None

    def _run(self, block: PassageBlock) -> BlockRun:
        ids = ranked(self.batch.query_ids, block.ids)
        run = BlockRun(self.query, block.passage, *ids, self.precision, self.workspace_bytes, False)
        run.exclude(*sorted_excluded(self.batch.excluded, self.query, block.passage, first=block.first))
        return run

    def _place(self, block: PassageBlock) -> tuple[Tensor, bool]:
        """The positives' places in the block, and whether they are its rows in order, which kernels need not read."""
        # `diagonal` says that query i's positive is row i of this rank's own passages: of the block that begins there.
        diagonal = self.batch.diagonal and block.first == self._first_passage
        positive = self.batch.positive
        return positive if diagonal or not block.first else positive - block.first, diagonal


def _programs(lines: int) -> int:
    return -(-lines // LINES)
