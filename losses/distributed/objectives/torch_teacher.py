"""InfoNCE and distillation from a teacher's embeddings, for one rank's queries against a block of passages, in PyTorch.

With T_ij = scale · t_i · t_j, masked as S, the divergence of a row is

    KL_i = Σ_j p_ij (T_ij − S_ij) − log Σ_j exp T_ij + log Σ_j exp S_ij,   p_ij = softmax_j(T_ij).

Σ_j exp T_ij and Σ_j exp T_ij (T_ij − S_ij) are two further sums over the row, with a shift of their own. Its gradient
with respect to S is softmax(S) − softmax(T), so backward computes both products of a tile again. Row sums have three
more kinds: the teacher's shift, Σ exp(T − shift) and Σ exp(T − shift) (T − S).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losses.distributed.blocks import ColumnSums, GradientWeights, PassageBlock, RowSums
from losses.distributed.torch_blocks import TorchBackend
from losses.inputs import ContrastiveBatch
from losses.options import Teacher
from losses.precision import GradientSums, Precision
from losses.torch_tiles.inf_cl import to_score_gradient
from losses.torch_tiles.statistics import add_tile
from losses.torch_tiles.tiles import ScoreTiles


class TorchTeacherBackend(TorchBackend):
    """`BlockBackend` whose rows also have the divergence from a teacher."""

    row_kinds = 6

    def __init__(
        self,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        first_passage: int,
        teacher: Teacher,
    ) -> None:
        # A tile is held as scores of both models, with a temporary each.
        super().__init__(batch, precision, workspace_bytes // 2, first_passage)
        self.teacher = teacher

    def own_extras(self) -> tuple[Tensor, ...]:
        return (self.prepare_passages(self.teacher.passage),)

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        table = super().initial_sums(kinds, size)
        if kinds == self.row_kinds:
            table[3] = torch.finfo(self.dtype).min
        return table

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        statistics = self._statistics(rows, columns.shift, columns.total)
        shift, total, difference = rows.table[3:]
        for tile, theirs, tiles, span, column_span in self._both_scores(block):
            # A removed entry is minus infinity in both, and adds nothing.
            differences = (theirs - tile).nan_to_num_(0, torch.inf, -torch.inf)
            new_shift = torch.maximum(shift[span], theirs.amax(1))
            factor = (shift[span] - new_shift).exp_()
            theirs.sub_(new_shift[:, None]).exp_()
            total[span] = total[span] * factor + theirs.sum(1)
            difference[span] = difference[span] * factor + differences.mul_(theirs).sum(1)
            shift[span] = new_shift
            add_tile(tile, tiles, statistics, span, column_span)

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        loss = super().loss_sum(rows, columns)
        return loss + self.teacher.weight * divergences(rows).sum(dtype=torch.float64)

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        found = super().gradient_weights(rows, columns, ds_scale)
        return GradientWeights(found.row + self.teacher.weight / rows.total, found.column, found.ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        statistics = self._statistics(rows, column_shift, column_shift)
        shift, teacher_weight = rows.table[3], self.teacher.weight / rows.table[4]
        sums = sums.cleared()
        for tile, theirs, tiles, span, column_span in self._both_scores(block):
            to_score_gradient(tile, tiles, statistics, (weights.row, weights.column), span, column_span)
            tile.sub_(theirs.sub_(shift[span, None]).exp_().mul_(teacher_weight[span, None]))
            factor = tiles.products.factor(tile)
            sums.block(span, column_span).add(factor, tiles.query_block(span), tiles.passage_block(column_span))

    def _both_scores(self, block: PassageBlock) -> Iterator[tuple[Tensor, Tensor, ScoreTiles, slice, slice]]:
        """(masked scores, the teacher's masked scores, tiles, rows, columns) of each tile.

        Both are valid until the next item and may be overwritten.
        """
        tiles, (passage_teacher,) = self._tiles(block), block.extras
        buffer = torch.empty(tiles.tile_rows * tiles.tile_columns, dtype=self.dtype, device=tiles.device)
        for span in tiles.row_blocks():
            query, query_teacher = tiles.query_block(span), tiles.products.operand(self.teacher.query[span])
            for column_span in tiles.column_blocks():
                theirs = buffer[: len(query) * (column_span.stop - column_span.start)].view(len(query), -1)
                tiles.products.scores(query_teacher, tiles.products.operand(passage_teacher[column_span]), theirs)
                theirs.mul_(self.teacher.scale)
                tile = tiles.scores(span, column_span, query, tiles.passage_block(column_span))
                yield tile, theirs.masked_fill_(tile == -torch.inf, -torch.inf), tiles, span, column_span


def divergences(rows: RowSums) -> Tensor:
    """[M]: KL of each row; shifts are exponents of e."""
    shift, total, _, teacher_shift, teacher_total, difference = rows.table
    return difference / teacher_total - teacher_shift - teacher_total.log() + shift + total.log()
