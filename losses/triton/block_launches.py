"""A visit of all tiles of a block of scores by the kernels: its sums in forward, its dS in backward.

A block is a whole batch on one GPU (triton/inf_cl.py), or a rank's queries with one block of the ring
(distributed/triton_blocks.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from losses.triton.kernel_batch import KernelBatch, span_length


@dataclass(frozen=True)
class SavedStatistics:
    """What forward leaves for backward: bounds [4], of queries [M], of passages [N]; in exponents of 2, float32.

    All in one tensor, so that one launch clears it.
    """

    bounds: Tensor
    score: Tensor
    row_sum: Tensor
    row_shift: Tensor
    column_sum: Tensor
    column_shift: Tensor

    @staticmethod
    def numel(queries: int, passages: int) -> int:
        return 4 + 3 * queries + 2 * passages

    @classmethod
    def split(cls, flat: Tensor, queries: int, passages: int) -> SavedStatistics:
        return cls(*flat.split([4, queries, queries, queries, passages, passages]))


def add_sums(
    kernel_batch: KernelBatch,
    statistics: SavedStatistics,
    logit_scale: Tensor,
    positive: Tensor,
    symmetric: bool,
    diagonal: bool,
    workspace_bytes: int,
    kept: Tensor | None = None,
) -> None:
    """Bring a visit of all tiles into the sums of `statistics`: of a batch, or of one block of its passages.

    Places in `positive` outside the kernel_batch's passages belong to other blocks. `kept` takes the exponentials of its rows.
    """
    import triton

    from losses.triton.block_sizes import forward_blocks
    from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES, merge_sums_kernel, tile_sums_kernel

    queries, passages = len(kernel_batch.query), len(kernel_batch.passage)
    # A kernel that also keeps tiles needs shared memory for their store, and other shapes suit it.
    shape_plain, shape_keeping = kernel_batch.shape("sums"), kernel_batch.shape("kept_sums")
    least_m, least_n = min(shape_plain.block_m, shape_keeping.block_m), min(shape_plain.block_n, shape_keeping.block_n)
    launches = list(forward_blocks(queries, passages, kernel_batch.blocks.kept_rows, workspace_bytes, least_m, least_n))
    buffer_size = max(
        span_length(rows) * triton.cdiv(span_length(columns), least_n)
        + span_length(columns) * triton.cdiv(span_length(rows), least_m)
        for rows, columns, _ in launches
    )
    sums, maxima = statistics.bounds.new_empty(2, buffer_size)
    for rows, columns, keep_block in launches:
        height, width = span_length(rows), span_length(columns)
        shape = shape_keeping if keep_block else shape_plain
        row_tiles, column_tiles = triton.cdiv(height, shape.block_m), triton.cdiv(width, shape.block_n)
        column_offset = height * column_tiles
        block = kept[rows, columns] if keep_block and kept is not None else kernel_batch.query
        # Of the two launches the device takes the one that the batch's bounds allow; the other ends at once.
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
                sums,
                maxima,
                sums[column_offset:],
                maxima[column_offset:],
                *kernel_batch.excluded_arguments,
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
                **launched.meta(),
            )
        size = max(height, width) if symmetric else height
        merge_sums_kernel[(triton.cdiv(size, MERGE_BLOCK), 2 if symmetric else 1)](
            statistics.bounds,
            logit_scale,
            statistics.row_sum[rows],
            statistics.row_shift[rows],
            sums,
            maxima,
            height,
            column_tiles,
            statistics.column_sum[columns],
            statistics.column_shift[columns],
            sums[column_offset:],
            maxima[column_offset:],
            width,
            row_tiles,
            BLOCK=MERGE_BLOCK,
            TILES=MERGE_TILES,
        )


@dataclass(frozen=True)
class ScoreGradientWeights:
    """What turns exponentials into ds_scale · M · dS: row [M], column [N], and `ds_scale`, which stands for 1 at positives."""

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
) -> None:
    """Write ds_scale · M · dS [rows, columns] into `gradient`, from recomputed or, where they fit, kept exponentials."""
    from losses.triton.kernels.gradients import score_gradient_kernel

    for safe in (True, False):
        from_kept = kept is not None and safe
        shape = kernel_batch.shape("kept_gradient" if from_kept else "gradient")
        launched = shape if safe else replace(shape, persistent=1)
        descriptor = kept if kept is not None and safe else gradient
        score_gradient_kernel[launched.grid(span_length(rows), span_length(columns), kernel_batch.processors)](
            kernel_batch.descriptor(kernel_batch.query[rows], shape.block_m, shape.block_k),
            kernel_batch.descriptor(kernel_batch.passage[columns], shape.block_n, shape.block_k),
            kernel_batch.descriptor(descriptor, shape.block_m, shape.block_n),
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
            **launched.meta(),
        )
