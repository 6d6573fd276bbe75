"""A visit of all tiles of a block of scores by the kernels: its sums in forward, its dS in backward.

A block is a whole batch on one GPU (triton/inf_cl.py), or a rank's queries with one block of the ring
(distributed/triton_blocks.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from losses.triton.kernel_batch import BlockRun, cells


@dataclass(frozen=True)
class State:
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
    def size(queries: int, passages: int) -> int:
        return 4 + 3 * queries + 2 * passages

    @classmethod
    def of(cls, flat: Tensor, queries: int, passages: int) -> State:
        return cls(*flat.split([4, queries, queries, queries, passages, passages]))


def add_sums(
    run: BlockRun,
    state: State,
    logit_scale: Tensor,
    positive: Tensor,
    symmetric: bool,
    diagonal: bool,
    workspace_bytes: int,
    kept: Tensor | None = None,
) -> None:
    """Bring a visit of all tiles into the sums of `state`: of a batch, or of one block of its passages.

    Places in `positive` outside the run's passages belong to other blocks. `kept` takes the exponentials of its rows.
    """
    import triton

    from losses.triton.block_sizes import forward_blocks
    from losses.triton.kernels.statistics import MERGE_LINES, MERGE_TILES, merge_sums_kernel, tile_sums_kernel

    queries, passages = len(run.query), len(run.passage)
    # A kernel that also keeps tiles needs shared memory for their store, and other shapes suit it.
    plain, keeper = run.shape("sums"), run.shape("kept_sums")
    least_m, least_n = min(plain.block_m, keeper.block_m), min(plain.block_n, keeper.block_n)
    launches = list(forward_blocks(queries, passages, run.blocks.kept_rows, workspace_bytes, least_m, least_n))
    room = max(
        cells(rows) * triton.cdiv(cells(columns), least_n) + cells(columns) * triton.cdiv(cells(rows), least_m)
        for rows, columns, _ in launches
    )
    sums, maxima = state.bounds.new_empty(2, room)
    for rows, columns, keeping in launches:
        height, width = cells(rows), cells(columns)
        shape = keeper if keeping else plain
        row_tiles, column_tiles = triton.cdiv(height, shape.block_m), triton.cdiv(width, shape.block_n)
        column_place = height * column_tiles
        block = kept[rows, columns] if keeping and kept is not None else run.query
        # Of the two launches the device takes the one that the batch's bounds allow; the other ends at once.
        for safe in (True, False):
            launched = shape if safe else replace(shape, persistent=1)
            tile_sums_kernel[launched.grid(height, width, run.processors)](
                run.described(run.query[rows], shape.block_m, shape.block_k),
                run.described(run.passage[columns], shape.block_n, shape.block_k),
                run.described(block, shape.block_m, shape.block_n if keeping else shape.block_k),
                state.bounds,
                logit_scale,
                positive,
                run.query_ids,
                run.passage_ids,
                state.score,
                sums,
                maxima,
                sums[column_place:],
                maxima[column_place:],
                *run.cell_keys,
                height,
                width,
                rows.start,
                columns.start,
                D=run.width,
                PRODUCT=run.product,
                SAFE=safe,
                SYMMETRIC=symmetric,
                DIAGONAL=diagonal,
                HAS_IDS=run.has_ids,
                HAS_EXCLUDED=run.has_excluded,
                KEEP=keeping,
                **launched.meta(),
            )
        lines = max(height, width) if symmetric else height
        merge_sums_kernel[(triton.cdiv(lines, MERGE_LINES), 2 if symmetric else 1)](
            state.bounds,
            logit_scale,
            state.row_sum[rows],
            state.row_shift[rows],
            sums,
            maxima,
            height,
            column_tiles,
            state.column_sum[columns],
            state.column_shift[columns],
            sums[column_place:],
            maxima[column_place:],
            width,
            row_tiles,
            LINES=MERGE_LINES,
            TILES=MERGE_TILES,
        )


@dataclass(frozen=True)
class Weights:
    """What turns exponentials into unit · M · dS: row [M], column [N], and `unit`, which stands for 1 at positives."""

    unit: Tensor
    row: Tensor
    column: Tensor
    symmetric: bool
    diagonal: bool


def score_gradient(
    run: BlockRun,
    state: State,
    weights: Weights,
    logit_scale: Tensor,
    positive: Tensor,
    rows: slice,
    columns: slice,
    gradient: Tensor,
    kept: Tensor | None = None,
) -> None:
    """Write unit · M · dS [rows, columns] into `gradient`, from recomputed or, where they fit, kept exponentials."""
    from losses.triton.kernels.gradients import score_gradient_kernel

    for safe in (True, False):
        from_kept = kept is not None and safe
        shape = run.shape("kept_gradient" if from_kept else "gradient")
        launched = shape if safe else replace(shape, persistent=1)
        described = kept if kept is not None and safe else gradient
        score_gradient_kernel[launched.grid(cells(rows), cells(columns), run.processors)](
            run.described(run.query[rows], shape.block_m, shape.block_k),
            run.described(run.passage[columns], shape.block_n, shape.block_k),
            run.described(described, shape.block_m, shape.block_n),
            run.described(gradient, shape.block_m, shape.block_n),
            state.bounds,
            logit_scale,
            weights.unit,
            positive,
            run.query_ids,
            run.passage_ids,
            state.score,
            weights.row,
            state.row_shift,
            weights.column,
            state.column_shift,
            *run.cell_keys,
            cells(rows),
            cells(columns),
            rows.start,
            columns.start,
            D=run.width,
            PRODUCT=run.product,
            SAFE=safe,
            SYMMETRIC=weights.symmetric,
            DIAGONAL=weights.diagonal,
            HAS_IDS=run.has_ids,
            HAS_EXCLUDED=run.has_excluded and not from_kept,
            KEPT=from_kept,
            **launched.meta(),
        )
