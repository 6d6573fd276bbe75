"""Scores of one rank's queries against a block of passages by Triton kernels (triton/inf_cl.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.distributed.blocks import ColumnSums, GradientFactors, GradientWeights, PartialSums, PassageBlock, RowSums
from losses.inputs import ContrastiveBatch
from losses.precision import GradientSums, Precision
from losses.torch_tiles.masks import NegativeMasks, PairGradients
from losses.triton.block_launches import (
    SavedStatistics,
    ScoreGradientWeights,
    add_sums,
    score_gradient,
    write_pair_gradients,
)
from losses.triton.kernel_batch import (
    GradientEpilogue,
    KernelBatch,
    choose_ds_scale,
    compact_ids_if_given,
    round_up_to_16_bytes,
    sorted_excluded,
    span_length,
)

BLOCK = 1024


class TritonBackend:
    """`BlockBackend` with Triton kernels; shifts are exponents of 2, and cuBLAS multiplies blocks of dS."""

    row_kinds = 3

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, first_passage: int) -> None:
        self.precision, self.workspace_bytes = precision, workspace_bytes
        self._first_passage, self._dimensions = first_passage, batch.query.shape[1]
        self.query = self.prepare_passages(batch.query)
        # The kernels read operands only, so the passage embeddings need not be held until backward.
        self.batch = replace(batch, query=self.query, passage=self.query[:0])
        self.width = self.query.shape[1]
        self._bounds = torch.empty(0)
        self._positives_remote = False
        self.exponent_unit = math.log(2)
        self.masks: NegativeMasks | None = None
        self.pair_gradients: PairGradients | None = None
        hardness = batch.options.hardness if batch.options is not None else 0.0
        self._tile_scale = batch.logit_scale + hardness if hardness else batch.logit_scale

    def own_extras(self) -> tuple[Tensor, ...]:
        return ()

    def prepare_passages(self, passage: Tensor) -> Tensor:
        from losses.triton.launch import operand

        return operand(passage, self.precision)

    def pair_products(self, query: Tensor, passage: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        from losses.triton.kernels.pairs import PRODUCT_BLOCK, PRODUCT_BLOCK_INTERPRETED, pair_products_kernel
        from losses.triton.launch import product_of
        from losses.triton.shapes import tile_shape

        product = product_of(self.precision, query.dtype)
        block = PRODUCT_BLOCK if query.is_cuda else PRODUCT_BLOCK_INTERPRETED
        pair_products_kernel[(-(-len(rows) // block),)](
            query,
            passage,
            rows,
            columns,
            products,
            len(rows),
            len(passage),
            D=query.shape[1],
            BLOCK=block,
            BLOCK_K=tile_shape("sums", self.width, query.dtype, product, query.device).block_k,
            PRODUCT=product,
        )

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        from losses.triton.kernels.bounds import measure_bounds

        batch, bounds = self.batch, torch.zeros(4, device=self.query.device)
        self._positives_remote = not positives_local
        if len(self.query) and len(own.passage):
            block_positive = batch.positive - own.first
            if self._positives_remote:
                block_positive = block_positive.clamp(0, len(own.passage) - 1)
            measure_bounds(self.query, own.passage, block_positive, batch.logit_scale, bounds)
        for side, squared in ((self.query, bounds[0]), (own.passage, bounds[1])):
            if len(side) and not (len(self.query) and len(own.passage)):
                squared += torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() ** 2
                bounds[3] = (~all_finite(side)).float()
        if self._positives_remote and len(self.query):
            # Assigning the number would copy it from the host and wait for the device.
            bounds[2].fill_(torch.inf)
        return bounds

    def set_bounds(self, bounds: Tensor) -> None:
        if self._positives_remote:
            # No positive score is below minus the bound of all scores.
            highest = bounds[0].sqrt() * bounds[1].sqrt() * self.batch.logit_scale.abs()
            bounds[2] = torch.minimum(bounds[2], highest)
        self._bounds = bounds

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        table = self.query.new_zeros(kinds, size, dtype=torch.float32)
        if not len(self.query):
            # The kernels take a total of zero as "no sum yet"; without queries no kernel runs.
            table[0] = torch.finfo(torch.float32).min
        return table

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        batch = self.batch
        statistics = SavedStatistics(self._bounds, rows.score, rows.total, rows.shift, columns.total, columns.shift)
        block_positive, diagonal = self._block_positive(block)
        add_sums(
            self._kernel_batch(block),
            statistics,
            self._tile_scale,
            block_positive,
            batch.symmetric,
            diagonal,
            self.workspace_bytes,
            first_passage=block.first,
        )

    def merge_columns(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        from losses.triton.kernels.partial_sums import merge_columns_kernel

        columns = one.shift.numel()
        if columns:
            merge_columns_kernel[(_programs(columns),)](one.table, other.table, columns, BLOCK=BLOCK)
        return one

    def rescale_columns(self, columns: ColumnSums, before: Tensor) -> None:
        from losses.triton.kernels.partial_sums import rescale_columns_kernel

        size = before.numel()
        rescale_columns_kernel[(_programs(size),)](columns.table, before, size, BLOCK=BLOCK)

    def log_sums(self, sums: PartialSums) -> Tensor:
        # The shift of a sum of zero may be minus infinity or unset.
        return torch.where(sums.total > 0, (sums.shift + sums.total.log2()) * math.log(2), -torch.inf)

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        from losses.triton.kernels.partial_sums import partial_loss_kernel

        table = rows.table if columns is None else columns.table
        queries, passages = len(rows.score), table.shape[1]
        partials = rows.table.new_empty(_programs(max(queries, passages)))
        if len(partials):
            partial_loss_kernel[(len(partials),)](
                self._bounds,
                rows.shift,
                rows.total,
                rows.score,
                table,
                table.stride(0),
                partials,
                queries,
                passages,
                SYMMETRIC=columns is not None,
                BLOCK=BLOCK,
            )
        return partials.sum(dtype=torch.float64)

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        return choose_ds_scale(self.query.dtype, positive_count, self._bounds)

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        from losses.triton.kernels.gradients import gradient_weights_kernel

        # Without columns the kernel does not read this table.
        table = rows.table if columns is None else columns.table
        row, column = torch.empty_like(rows.total), torch.empty_like(table[1])
        size = max(len(row), len(column))
        if size:
            gradient_weights_kernel[(_programs(size),)](
                ds_scale,
                table[2],
                rows.total,
                table[1],
                row,
                column,
                len(row),
                len(column),
                SYMMETRIC=columns is not None,
                DIAGONAL=False,
                BLOCK=BLOCK,
            )
        return GradientWeights(row, None if columns is None else column, ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        from losses.triton.block_sizes import spans

        batch, kernel_batch = self.batch, self._kernel_batch(block)
        block_positive, diagonal = self._block_positive(block)
        of_columns = weights.row if weights.column is None else weights.column
        statistics = SavedStatistics(self._bounds, rows.score, rows.total, rows.shift, column_shift, column_shift)
        kernel_weights = ScoreGradientWeights(weights.ds_scale, weights.row, of_columns, batch.symmetric, diagonal)
        pairs = self.pair_gradients
        pair_columns = None if pairs is None else pairs.columns - block.first
        blocks = kernel_batch.blocks
        workspace = kernel_batch.query.new_empty(blocks.rows * round_up_to_16_bytes(blocks.columns, kernel_batch.dtype))
        for span in spans(0, len(kernel_batch.query), blocks.rows):
            for columns in spans(0, len(kernel_batch.passage), blocks.columns):
                height, width = span_length(span), span_length(columns)
                stride = round_up_to_16_bytes(width, kernel_batch.dtype)
                gradient = workspace[: height * stride].view(height, stride)[:, :width]
                score_gradient(
                    kernel_batch,
                    statistics,
                    kernel_weights,
                    self._tile_scale,
                    block_positive,
                    span,
                    columns,
                    gradient,
                )
                if pairs is not None and pair_columns is not None:
                    write_pair_gradients(kernel_batch, pairs, pair_columns, span, columns, gradient)
                sums.block(span, columns).add(gradient, kernel_batch.query[span], kernel_batch.passage[columns])

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        out = sums
        if dtype is not None and (dtype != torch.float32 or self.width != self._dimensions):
            out = sums.new_empty(len(sums), self._dimensions, dtype=dtype)
        if not len(sums):
            return None if dtype is None else out, sums.new_zeros(()) if scale else None
        scale_of = (self.batch.logit_scale, factors.ds_scale, factors.upstream)
        epilogue = GradientEpilogue(self.width, *scale_of, 1 / factors.share)
        partials = epilogue(sums, self.query, out, scale)
        return None if dtype is None else out, partials.sum() if scale else None

    def _kernel_batch(self, block: PassageBlock) -> KernelBatch:
        ids = compact_ids_if_given(self.batch.query_ids, block.ids)
        kernel_batch = KernelBatch(self.query, block.passage, *ids, self.precision, self.workspace_bytes, False)
        kernel_batch.set_excluded(*sorted_excluded(self.batch.excluded, self.query, block.passage, first=block.first))
        if self.masks is not None:
            kernel_batch.set_masks(self.masks, block.guide)
        return kernel_batch

    def _block_positive(self, block: PassageBlock) -> tuple[Tensor, bool]:
        """Positives relative to the block, and whether they are its rows in order; kernels then do not read them."""
        # `diagonal` means that the positives are this rank's passages in order, which only its own block holds.
        diagonal = self.batch.diagonal and block.first == self._first_passage
        positive = self.batch.positive
        return positive if diagonal or not block.first else positive - block.first, diagonal


def _programs(size: int) -> int:
    return -(-size // BLOCK)
