"""Distillation from given scores of a list of passages for each query, added to any backend of whole embeddings.

The scores of the lists are computed while the blocks of passages are visited, so that nothing more is sent between
ranks. Memory is a few numbers for each listed passage, and a chunk of gathered embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.checks import accumulator_dtype
from losses.distributed.blocks import (
    BlockBackend,
    ColumnSums,
    GradientFactors,
    GradientWeights,
    PartialSums,
    PassageBlock,
    RowSums,
)
from losses.distributed.torch_blocks import TorchBackend
from losses.inputs import ContrastiveBatch
from losses.options import TeacherScores
from losses.precision import GradientSums, Precision, round_operand

CHUNK_BYTES = 16 * 2**20


class NoScoresBackend(TorchBackend):
    """A `BlockBackend` without InfoNCE, to which the lists of a `TeacherScores` are added."""

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        """No-op: there are no sums."""

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        return torch.where(self._invalid, torch.nan, rows.total.new_zeros((), dtype=torch.float64))

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        return GradientWeights(torch.zeros_like(rows.total), None, ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        sums.cleared()


class TeacherScoresBackend:
    """A `BlockBackend` that adds the lists' loss and gradients to those of another."""

    def __init__(
        self, inner: BlockBackend, batch: ContrastiveBatch, precision: Precision, teacher: TeacherScores
    ) -> None:
        self.inner, self.batch, self.precision, self.teacher = inner, inner.batch, precision, teacher
        self.query, self.width, self.row_kinds = inner.query, inner.width, inner.row_kinds
        self.exponent_unit, self.masks, self.pair_gradients = inner.exponent_unit, inner.masks, inner.pair_gradients
        self.dtype = accumulator_dtype(batch.query.dtype)
        lengths = teacher.offsets.diff()
        self._lengths = lengths
        pairs = torch.arange(len(teacher.passages), device=teacher.passages.device)
        # [P] the query of each listed passage. Not by repeat_interleave, which would wait for the device to learn the
        # size of its result.
        self._rows = torch.bucketize(pairs, teacher.offsets[1:], right=True)
        self._scores = torch.full((len(pairs),), torch.nan, dtype=self.dtype, device=pairs.device)

    def own_extras(self) -> tuple[Tensor, ...]:
        return self.inner.own_extras()

    def prepare_passages(self, passage: Tensor) -> Tensor:
        return self.inner.prepare_passages(passage)

    def pair_products(self, query: Tensor, passage: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        self.inner.pair_products(query, passage, rows, columns, products)

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        return self.inner.score_bounds(own, positives_local)

    def set_bounds(self, bounds: Tensor) -> None:
        self.inner.set_bounds(bounds)

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        return self.inner.initial_sums(kinds, size)

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        self.inner.accumulate_sums(block, rows, columns)
        for chunk, own, inside, column in self._pairs(block):
            query, passage = self._operand(self.query[own]), self._operand(block.passage[column])
            scores = (query * passage).sum(1).mul_(self.batch.logit_scale.detach())
            self._scores[chunk] = torch.where(inside, scores, self._scores[chunk])

    def merge_columns(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        return self.inner.merge_columns(one, other)

    def rescale_columns(self, columns: ColumnSums, before: Tensor) -> None:
        self.inner.rescale_columns(columns, before)

    def log_sums(self, sums: PartialSums) -> Tensor:
        return self.inner.log_sums(sums)

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        loss = self.inner.loss_sum(rows, columns)
        return loss + self.teacher.weight * self._list_losses().sum(dtype=torch.float64)

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        return self.inner.choose_ds_scale(positive_count)

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        return self.inner.gradient_weights(rows, columns, ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        self.inner.accumulate_gradients(block, rows, column_shift, weights, sums)
        gradient = self._list_gradient() * (self.teacher.weight * weights.ds_scale)
        for chunk, own, inside, column in self._pairs(block):
            factor = torch.where(inside, gradient[chunk], 0)[:, None]
            if sums.query is not None:
                sums.query.index_add_(0, own, factor * self._operand(block.passage[column]))
            if sums.passage is not None:
                sums.passage.index_add_(0, column, factor * self._operand(self.query[own]))

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return self.inner.finish_gradient(sums, factors, dtype, scale, of_queries)

    def _operand(self, rows: Tensor) -> Tensor:
        return round_operand(rows, self.precision)

    def _pairs(self, block: PassageBlock) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
        """(slice of the lists, query rows, whether in the block, rows of the block) of each chunk.

        Passages of other blocks are replaced by one of the block: selecting would synchronize with the device.
        """
        size = max(1, CHUNK_BYTES // (4 * self.width * self.dtype.itemsize))
        found = []
        for start in range(0, len(self._rows), size):
            chunk = slice(start, start + size)
            column = self.teacher.passages[chunk] - block.first
            last = len(block.passage) - 1
            found.append((chunk, self._rows[chunk], (column >= 0) & (column <= last), column.clamp(0, last)))
        return found

    def _sums(self, values: Tensor) -> Tensor:
        """[M]: sums over each list."""
        return values.new_zeros(len(self._lengths)).index_add_(0, self._rows, values)

    def _log_softmax(self, scores: Tensor) -> Tensor:
        """[P]: logarithm of the softmax over each list."""
        highest = scores.new_full((len(self._lengths),), -torch.inf)
        highest = highest.scatter_reduce(0, self._rows, scores.detach(), "amax")
        shifted = scores - highest[self._rows]
        return shifted - self._sums(shifted.exp()).log()[self._rows]

    def _differences(self) -> Tensor:
        """[P]: S_ip − S_ij − scale · (t_ip − t_ij), where p is the first passage of the list."""
        difference = self._scores - self.teacher.scale * self.teacher.scores
        first = self.teacher.offsets[:-1].clamp(max=max(0, len(difference) - 1))
        return difference[first][self._rows] - difference

    def _list_losses(self) -> Tensor:
        """[M]: loss of each list."""
        if not len(self._rows):
            return self._scores.new_zeros(len(self._lengths))
        if self.teacher.kind == "kl":
            theirs = self._log_softmax(self.teacher.scale * self.teacher.scores)
            return self._sums(theirs.exp() * (theirs - self._log_softmax(self._scores)))
        return self._sums(self._differences() ** 2) / (self._lengths - 1).clamp(min=1)

    def _list_gradient(self) -> Tensor:
        """[P]: derivative of the sum of the lists' losses with respect to S."""
        if not len(self._rows):
            return self._scores
        if self.teacher.kind == "kl":
            theirs = self._log_softmax(self.teacher.scale * self.teacher.scores)
            return self._log_softmax(self._scores).exp() - theirs.exp()
        share = 2 * self._differences() / (self._lengths - 1).clamp(min=1)[self._rows]
        # The first passage of a list has all the margins of its list; its own margin is zero.
        is_first = torch.arange(len(share), device=share.device) == self.teacher.offsets[self._rows]
        return torch.where(is_first, self._sums(share)[self._rows], 0) - share
