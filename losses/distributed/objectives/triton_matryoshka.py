"""Matryoshka scores of one rank's queries against a block of passages by Triton kernels.

The equations are in torch_matryoshka.py, the kernels and their launches in triton/kernels/matryoshka and
triton/matryoshka. Shifts and scores are exponents of 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.distributed.blocks import ColumnSums, GradientFactors, GradientWeights, PassageBlock, RowSums
from losses.distributed.objectives.torch_matryoshka import weighted_loss_sum
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.option_checks.objective import Prefixes
from losses.precision import GradientSums, Precision
from losses.triton.block_launches import SavedStatistics
from losses.triton.block_sizes import round_up
from losses.triton.matryoshka.gradients import PrefixGradientWeights, add_prefix_gradients, finish_prefix_gradient
from losses.triton.matryoshka.setup import MatryoshkaSetup, PrefixBlock
from losses.triton.matryoshka.sums import add_prefix_sums, inverse_lengths, raise_lowest_positive

LN_2 = math.log(2)


class TritonMatryoshkaBackend(TritonBackend):
    """`BlockBackend` for prefixes of the embeddings; tables have a dimension of prefixes."""

    def __init__(
        self,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        first_passage: int,
        prefixes: Prefixes,
    ) -> None:
        self._prefixes = prefixes
        self._setup = MatryoshkaSetup.of(prefixes, batch.query, precision)
        super().__init__(batch, precision, workspace_bytes, first_passage)
        # The sums have a further column for each prefix, in whole 16 bytes.
        self.width = self._setup.layout.width + round_up(len(prefixes.dims), 4)
        self._weights = prefixes.weight_column(batch.logit_scale)
        self._query_inverse = inverse_lengths(self._setup, self.query)
        self._own_passage = self.query[:0]

    def prepare_passages(self, passage: Tensor) -> Tensor:
        return self._setup.layout.pack(passage, self.precision)

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        self._own_passage = own.passage
        self._positives_remote = not positives_local
        sides = [side for side in (self.query, own.passage) if len(side)]
        bounds = self._weights.new_zeros(4)
        # No cosine exceeds 1.
        bounds[:2] = 1
        if sides:
            bounds[3] = (~all_finite(*sides)).float()
        if self._positives_remote and len(self.query):
            bounds[2] = torch.inf
        elif len(self.query) and len(own.passage):
            positive, scale = self.batch.positive - own.first, self.batch.logit_scale
            raise_lowest_positive(self._setup, bounds, self.query, own.passage, positive, scale, self._query_inverse)
        return bounds

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        prefixes = len(self._prefixes.dims)
        return super().initial_sums(kinds, prefixes * size).view(kinds, prefixes, size)

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        statistics = [
            SavedStatistics(self._bounds, *of_prefix)
            for of_prefix in zip(rows.score, rows.total, rows.shift, columns.total, columns.shift, strict=True)
        ]
        add_prefix_sums(self._setup, self._prefix_block(block), statistics, rows.score, self.workspace_bytes)

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        in_nats = RowSums(_in_nats(rows.table, (0, 2)))
        column_table = None if columns is None else ColumnSums(_in_nats(columns.table, (0, 3)))
        loss = weighted_loss_sum(in_nats, column_table, self._weights)
        return torch.where(self._bounds[3] > 0, torch.nan, loss)

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        return self._bounds.new_ones(())

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        half = 1.0 if columns is None else 0.5
        row = half * self._weights / rows.total
        column = None
        if columns is not None:
            _, total, positive_count, _ = columns.table
            column = torch.where(positive_count > 0, half * self._weights * positive_count / total, 0)
        return GradientWeights(row, column, ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        column = weights.row if weights.column is None else weights.column
        of_prefixes = PrefixGradientWeights(self._weights, weights.row, rows.shift, column, column_shift)
        add_prefix_gradients(self._setup, self._prefix_block(block), of_prefixes, sums, self.workspace_bytes)

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        width, prefixes = self._setup.layout.width, self._prefixes
        along = sums[:, width : width + len(prefixes.dims)]
        of_scale = along.sum() * (factors.upstream.float() * factors.share) if scale else None
        if dtype is None:
            return None, of_scale
        side = self.query if of_queries else self._own_passage
        out = sums.new_empty(len(sums), self._dimensions, dtype=dtype)
        if prefixes.dims[-1] < self._dimensions:
            out.zero_()
        if len(sums):
            inverse = self._query_inverse if of_queries else inverse_lengths(self._setup, side)
            finish_prefix_gradient(
                self._setup, sums, side, inverse, out, self.batch.logit_scale, factors.upstream, factors.share
            )
        return out, of_scale

    def _prefix_block(self, block: PassageBlock) -> PrefixBlock:
        positive, diagonal = self._block_positive(block)
        return PrefixBlock(
            self._kernel_batch(block),
            self._query_inverse,
            inverse_lengths(self._setup, block.passage),
            self._bounds,
            self.batch.logit_scale,
            positive,
            diagonal,
            self.batch.symmetric,
        )


def _in_nats(table: Tensor, kinds: tuple[int, ...]) -> Tensor:
    """A copy in which shifts and scores, the rows `kinds`, are exponents of e."""
    table = table.clone()
    for kind in kinds:
        table[kind] *= LN_2
    return table
