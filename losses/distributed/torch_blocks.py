"""Scores of one rank's queries against a block of passages in PyTorch, on any device (torch_tiles/inf_cl.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.checks import accumulator_dtype
from losses.distributed.blocks import ColumnSums, GradientFactors, GradientWeights, PartialSums, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch
from losses.precision import BlockProducts, GradientSums, Precision
from losses.torch_tiles.inf_cl import add_row_gradients
from losses.torch_tiles.masks import NegativeMasks, PairGradients
from losses.torch_tiles.statistics import (
    Statistics,
    add_statistics,
    constant_shift,
    negative_log_probability,
    score_bounds,
)
from losses.torch_tiles.tiles import ScoreTiles, TileMasks

SCALE_ROWS = 8192
PAIR_ROWS = 2048


def pairs_in_block(batch: ContrastiveBatch, first: int) -> Tensor | None:
    """[R, 2]: excluded pairs with passage rows relative to a block that begins at row `first` of the pool.

    Pairs of other blocks are kept, with passage rows outside the block.
    """
    if batch.excluded is None or not first:
        return batch.excluded
    rows, columns = batch.excluded.unbind(1)
    return torch.stack([rows, columns - first], 1)


class TorchBackend:
    """`BlockBackend` with tiles in PyTorch; shifts are exponents of e."""

    row_kinds = 3

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, first_passage: int) -> None:
        self.batch, self.precision, self.workspace_bytes = batch, precision, workspace_bytes
        self.query = batch.query
        self.width = batch.query.shape[1]
        self.dtype = accumulator_dtype(batch.query.dtype)
        self._constant: Tensor | None = None
        self._invalid = torch.empty(0)
        self.exponent_unit = 1.0
        self.masks: NegativeMasks | None = None
        self.pair_gradients: PairGradients | None = None
        hardness = batch.options.hardness if batch.options is not None else 0.0
        self._tile_scale = batch.logit_scale + hardness if hardness else batch.logit_scale

    def own_extras(self) -> tuple[Tensor, ...]:
        return ()

    def prepare_passages(self, passage: Tensor) -> Tensor:
        return (passage.to(torch.bfloat16) if self.precision == "bf16" else passage).contiguous()

    def pair_products(self, query: Tensor, passage: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        operand = BlockProducts(self.precision, query.device).operand
        chunks = (each.split(PAIR_ROWS) for each in (rows, columns, products))
        for row, column, product in zip(*chunks, strict=True):
            inside = (column >= 0) & (column < len(passage))
            sides = query[row], passage[column.clamp(0, len(passage) - 1)]
            one, other = (operand(side).to(self.dtype) for side in sides)
            product.copy_(torch.where(inside, (one * other).sum(1), product))

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        return score_bounds(self._tiles(own), positives_local=positives_local)

    def set_bounds(self, bounds: Tensor) -> None:
        self._invalid = bounds[3] > 0
        if self.batch.symmetric and bounds.device.type == "cpu":
            self._constant = constant_shift(bounds, self._tile_scale)

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        table = self.query.new_zeros(kinds, size, dtype=self.dtype)
        table[0] = torch.finfo(self.dtype).min if self._constant is None else self._constant
        return table

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        add_statistics(self._tiles(block), self._statistics(rows, columns.shift, columns.total))

    def merge_columns(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        shift = torch.maximum(one.shift, other.shift)
        # A fully masked column has maximum minus infinity; avoid subtracting infinities.
        base = torch.where(shift == -torch.inf, 0, shift)
        one_total, other_total = (sums.total * (sums.shift - base).exp() for sums in (one, other))
        return ColumnSums(torch.stack([shift, one_total + other_total, *(one.table[2:] + other.table[2:])]))

    def rescale_columns(self, columns: ColumnSums, before: Tensor) -> None:
        # A fully masked column has sum zero, so any finite factor is right.
        columns.total.mul_((before - columns.shift).nan_to_num_(0, 0, -float("inf")).exp_())

    def log_sums(self, sums: PartialSums) -> Tensor:
        return sums.shift + sums.total.log()

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        loss = negative_log_probability(rows.score, rows.shift, rows.total).sum(dtype=torch.float64)
        if columns is not None:
            shift, total, positive_count, scores = columns.table
            losses = negative_log_probability(scores / positive_count.clamp(min=1), shift, total)
            loss = (loss + torch.where(positive_count > 0, positive_count * losses, 0).sum(dtype=torch.float64)) / 2
        # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
        return torch.where(self._invalid, torch.nan, loss)

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        return self.query.new_ones((), dtype=self.dtype)

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        if columns is None:
            return GradientWeights(ds_scale / rows.total, None, ds_scale)
        column = torch.where(columns.positive_count > 0, ds_scale * columns.positive_count / (2 * columns.total), 0)
        return GradientWeights(ds_scale / (2 * rows.total), column, ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        sums = sums.cleared()
        tiles, statistics = self._tiles(block), self._statistics(rows, column_shift, column_shift)
        for span in tiles.row_blocks():
            of_rows = sums.block(span, slice(0, None))
            gradient_weights = (weights.row, weights.column)
            add_row_gradients(
                tiles, statistics, gradient_weights, span, tiles.query_block(span), of_rows.query, of_rows.passage
            )

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        factor = factors.upstream.to(self.dtype) * factors.share / factors.ds_scale
        of_scale = self._scale_gradient(sums) * factor if scale else None
        of_sums = None if dtype is None else sums.mul_(factor * self.batch.logit_scale.detach()).to(dtype)
        return of_sums, of_scale

    def _scale_gradient(self, sums: Tensor) -> Tensor:
        """Σ dS ∘ (Q Kᵀ) = Σ Q ∘ (dS K), in chunks of rows to bound the size of the elementwise product."""
        parts = zip(sums.split(SCALE_ROWS), self.query.split(SCALE_ROWS), strict=True)
        return torch.stack([(span * rows.to(span.dtype)).sum() for span, rows in parts]).sum()

    def _tiles(self, block: PassageBlock) -> ScoreTiles:
        batch = self.batch
        block_batch = ContrastiveBatch(
            batch.query,
            block.passage,
            self._tile_scale,
            batch.positive - block.first,
            batch.query_ids,
            block.ids,
            batch.symmetric,
            excluded=pairs_in_block(batch, block.first),
        )
        masks = None if self.masks is None else TileMasks(self.masks, block.guide, block.first, self.pair_gradients)
        return ScoreTiles(block_batch, self.precision, self.workspace_bytes, masks)

    def _statistics(self, rows: RowSums, column_shift: Tensor, column_total: Tensor) -> Statistics:
        shift, total = (column_shift, column_total) if self.batch.symmetric else (None, None)
        return Statistics(rows.score, rows.shift, rows.total, shift, total, self._constant)
