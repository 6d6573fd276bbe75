"""Kernel launches for one block of scores: softmax sums in forward, dS in backward.

A block is a whole batch on one GPU (triton/inf_cl.py), or a rank's queries against one block of passages
(distributed/triton_blocks.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from losses.torch_tiles.masks import PairGradients
from losses.torch_tiles.row_terms import Shares
from losses.triton.kernel_batch import KernelBatch, span_length


@dataclass(frozen=True)
class SavedStatistics:
    """Softmax statistics that forward saves for backward, float32; shifts and scores are exponents of 2.

    `bounds` is [4]; `score`, `row_sum` and `row_shift` are [M]; `column_sum` and `column_shift` are [N]. On one GPU
    they are views of one tensor, so that one launch clears them.
    """

    bounds: Tensor
    score: Tensor
    row_sum: Tensor
    row_shift: Tensor
    column_sum: Tensor
    column_shift: Tensor

    @staticmethod
    def numel(queries: int, passages: int) -> int:
        """Number of elements of the tensor."""
        return 4 + 3 * queries + 2 * passages

    @classmethod
    def split(cls, flat: Tensor, queries: int, passages: int) -> SavedStatistics:
        """Views of the tensor `flat`."""
        return cls(*flat.split([4, queries, queries, queries, passages, passages]))

    def block(self, rows: slice, columns: slice) -> SavedStatistics:
        """Views of the statistics of a block."""
        score, row_sum, row_shift = self.score[rows], self.row_sum[rows], self.row_shift[rows]
        return SavedStatistics(
            self.bounds, score, row_sum, row_shift, self.column_sum[columns], self.column_shift[columns]
        )


@dataclass(frozen=True)
class TileSums:
    """What the tiles of a launch write: sums and, unless one shift is safe for all, maxima.

    Those of rows are [column tiles, rows], those of columns are [row tiles, columns]; all are float32, without gaps.
    """

    row_sum: Tensor
    row_max: Tensor
    column_sum: Tensor
    column_max: Tensor

    def merge_into(
        self, statistics: SavedStatistics, logit_scale: Tensor, row_tiles: int, column_tiles: int, symmetric: bool
    ) -> None:
        """Add the sums of the tiles to the statistics of their block; those of columns only for a symmetric loss."""
        import triton

        from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES, merge_sums_kernel

        height, width = len(statistics.row_sum), len(statistics.column_sum)
        size = max(height, width) if symmetric else height
        merge_sums_kernel[(triton.cdiv(size, MERGE_BLOCK), 2 if symmetric else 1)](
            statistics.bounds,
            logit_scale,
            statistics.row_sum,
            statistics.row_shift,
            self.row_sum,
            self.row_max,
            height,
            column_tiles,
            statistics.column_sum,
            statistics.column_shift,
            self.column_sum,
            self.column_max,
            width,
            row_tiles,
            BLOCK=MERGE_BLOCK,
            TILES=MERGE_TILES,
        )


def add_sums(
    kernel_batch: KernelBatch,
    statistics: SavedStatistics,
    logit_scale: Tensor,
    positive: Tensor,
    symmetric: bool,
    diagonal: bool,
    workspace_bytes: int,
    kept: Tensor | None = None,
    first_passage: int = 0,
) -> None:
    """Add all tiles of a batch, or of one block of its passages, to the sums of `statistics`.

    Values of `positive` outside the passages of `kernel_batch` belong to other blocks. `kept` receives the
    exponentials of the rows that are kept. `first_passage` is the row of the pool at which the passages begin, for
    statistics of the batch's masks.
    """
    import triton

    from losses.triton.block_sizes import forward_blocks
    from losses.triton.kernels.row_statistics import FIELDS, merge_statistics_kernel
    from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES, tile_sums_kernel

    queries, passages = len(kernel_batch.query), len(kernel_batch.passage)
    # A kernel that also stores its tiles needs shared memory for the store, so it has a tile shape of its own.
    sums_shape, kept_shape = kernel_batch.shape("sums"), kernel_batch.shape("kept_sums")
    min_block_m, min_block_n = min(sums_shape.block_m, kept_shape.block_m), min(sums_shape.block_n, kept_shape.block_n)
    counted = kernel_batch.masks.statistics if kernel_batch.masks is not None else None
    own_product = kernel_batch.query if kernel_batch.masks is None else kernel_batch.masks.product
    statistics_bytes = 4 * FIELDS / min_block_n if counted is not None else 0.0
    launches = list(
        forward_blocks(
            queries,
            passages,
            kernel_batch.blocks.kept_rows,
            workspace_bytes,
            min_block_m,
            min_block_n,
            statistics_bytes,
        )
    )
    buffer_size = max(
        span_length(rows) * triton.cdiv(span_length(columns), min_block_n)
        + span_length(columns) * triton.cdiv(span_length(rows), min_block_m)
        for rows, columns, _ in launches
    )
    sums, maxima = statistics.bounds.new_empty(2, buffer_size)
    row_fields = 0
    if counted is not None:
        row_fields = max(
            span_length(rows) * triton.cdiv(span_length(columns), min_block_n) for rows, columns, _ in launches
        )
    tile_statistics = sums if counted is None else sums.new_empty(FIELDS * row_fields)
    for rows, columns, keep_block in launches:
        height, width = span_length(rows), span_length(columns)
        shape = kept_shape if keep_block else sums_shape
        row_tiles, column_tiles = triton.cdiv(height, shape.block_m), triton.cdiv(width, shape.block_n)
        column_offset = height * column_tiles
        tile_sums = TileSums(sums, maxima, sums[column_offset:], maxima[column_offset:])
        block = kept[rows, columns] if keep_block and kept is not None else kernel_batch.query
        # Both variants are launched. The bounds on the device decide which one computes; the other returns at once.
        for safe in (True, False):
            launched = shape if safe else replace(shape, persistent=1)
            tile_sums_kernel[launched.grid(height, width, kernel_batch.processors)](
                kernel_batch.descriptor(kernel_batch.query[rows], shape.block_m, shape.block_k),
                kernel_batch.descriptor(kernel_batch.passage[columns], shape.block_n, shape.block_k),
                kernel_batch.descriptor(block, shape.block_m, shape.block_n if keep_block else shape.block_k),
                statistics.bounds,
                logit_scale,
                positive,
                kernel_batch.query_ids,
                kernel_batch.passage_ids,
                statistics.score,
                tile_sums.row_sum,
                tile_sums.row_max,
                tile_sums.column_sum,
                tile_sums.column_max,
                *kernel_batch.excluded_arguments,
                *kernel_batch.mask_arguments(rows, columns, shape),
                own_product,
                tile_statistics,
                row_fields,
                height,
                width,
                rows.start,
                columns.start,
                D=kernel_batch.width,
                PRODUCT=kernel_batch.product,
                SAFE=safe,
                SYMMETRIC=symmetric,
                DIAGONAL=diagonal,
                HAS_IDS=kernel_batch.has_ids,
                HAS_EXCLUDED=kernel_batch.has_excluded,
                KEEP=keep_block,
                STATISTICS=counted is not None,
                **kernel_batch.mask_options,
                **launched.meta(),
            )
        if counted is not None:
            merge_statistics_kernel[(triton.cdiv(height, MERGE_BLOCK),)](
                statistics.bounds,
                logit_scale,
                statistics.row_sum[rows],
                statistics.row_shift[rows],
                sums,
                maxima,
                tile_statistics,
                row_fields,
                counted.higher[rows],
                counted.counted[rows],
                counted.hardest[rows],
                counted.hardest_exponent[rows],
                counted.weighted[rows],
                height,
                column_tiles,
                first_passage + columns.start,
                BLOCK=MERGE_BLOCK,
                TILES=MERGE_TILES,
            )
        tile_sums.merge_into(statistics.block(rows, columns), logit_scale, row_tiles, column_tiles, symmetric)


def merged_loss(
    statistics: SavedStatistics,
    loss: Tensor,
    positive: Tensor,
    further: Tensor,
    single_partition: bool,
    symmetric: bool,
) -> tuple[Tensor, Shares]:
    """The loss with further terms of the row sums, from the loss of the pool, and the shares of the terms."""
    row = (statistics.row_shift + statistics.row_sum.log2()) * math.log(2)
    if not single_partition:
        shares = Shares.of(row, None, further)
        return loss - shares.log_row.mean() / (2 if symmetric else 1), shares
    # An out-of-range positive has already made the loss NaN.
    own = positive.clamp(0, len(statistics.column_sum) - 1)
    column = (statistics.column_shift[own] + statistics.column_sum[own].log2()) * math.log(2)
    shares = Shares.of(row, column, further)
    # Here the pool's loss is half the sum of row and column losses. Replace the column losses by the row losses.
    difference = (row - column).mean() / 2
    return loss + difference - shares.log_row.mean(), shares


@dataclass(frozen=True)
class ScoreGradientWeights:
    """Factors that turn exponentials into ds_scale · M · dS.

    `row` is [M], `column` is [N], and `ds_scale` (0-dim) is subtracted at the positives in place of 1.
    """

    ds_scale: Tensor
    row: Tensor
    column: Tensor
    symmetric: bool
    diagonal: bool


def score_gradient(
    kernel_batch: KernelBatch,
    statistics: SavedStatistics,
    weights: ScoreGradientWeights,
    logit_scale: Tensor,
    positive: Tensor,
    rows: slice,
    columns: slice,
    gradient: Tensor,
    kept: Tensor | None = None,
    variants: tuple[bool, ...] = (True, False),
) -> None:
    """Write ds_scale · M · dS[rows, columns] to `gradient`, from kept exponentials if given, otherwise recomputed.

    Kept exponentials are used only if one shift is safe for the whole matrix, which the device decides. `variants`
    are those that are launched: (False,) writes only if no shift is safe.
    """
    from losses.triton.kernels.gradients import score_gradient_kernel

    for safe in variants:
        from_kept = kept is not None and safe
        shape = kernel_batch.shape("kept_gradient" if from_kept else "gradient")
        launched = shape if safe else replace(shape, persistent=1)
        source = kept if kept is not None and safe else gradient
        score_gradient_kernel[launched.grid(span_length(rows), span_length(columns), kernel_batch.processors)](
            kernel_batch.descriptor(kernel_batch.query[rows], shape.block_m, shape.block_k),
            kernel_batch.descriptor(kernel_batch.passage[columns], shape.block_n, shape.block_k),
            kernel_batch.descriptor(source, shape.block_m, shape.block_n),
            kernel_batch.descriptor(gradient, shape.block_m, shape.block_n),
            statistics.bounds,
            logit_scale,
            weights.ds_scale,
            positive,
            kernel_batch.query_ids,
            kernel_batch.passage_ids,
            statistics.score,
            weights.row,
            statistics.row_shift,
            weights.column,
            statistics.column_shift,
            *kernel_batch.excluded_arguments,
            *kernel_batch.mask_arguments(rows, columns, shape),
            span_length(rows),
            span_length(columns),
            rows.start,
            columns.start,
            D=kernel_batch.width,
            PRODUCT=kernel_batch.product,
            SAFE=safe,
            SYMMETRIC=weights.symmetric,
            DIAGONAL=weights.diagonal,
            HAS_IDS=kernel_batch.has_ids,
            HAS_EXCLUDED=kernel_batch.has_excluded and not from_kept,
            KEPT=from_kept,
            **kernel_batch.mask_options,
            **launched.meta(),
        )


def write_pair_gradients(
    kernel_batch: KernelBatch,
    pairs: PairGradients,
    columns_of_block: Tensor,
    rows: slice,
    columns: slice,
    gradient: Tensor,
) -> None:
    """Write the derivatives at the pairs inside [rows, columns] to `gradient`.

    `columns_of_block` [P] are the passages of the pairs, relative to those of `kernel_batch`.
    """
    import triton

    from losses.triton.kernels.pairs import WRITE_BLOCK, write_pair_gradients_kernel

    write_pair_gradients_kernel[(triton.cdiv(len(pairs.rows), WRITE_BLOCK),)](
        gradient,
        pairs.rows,
        columns_of_block,
        pairs.values,
        len(pairs.rows),
        rows.start,
        span_length(rows),
        columns.start,
        span_length(columns),
        gradient.stride(0),
        PRODUCT=kernel_batch.product,
        BLOCK=WRITE_BLOCK,
    )
