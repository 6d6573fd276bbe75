"""Forward: launches of the kernels that measure the prefixes and add their softmax sums."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.triton.block_launches import SavedStatistics, TileSums
from losses.triton.block_sizes import forward_blocks
from losses.triton.kernel_batch import span_length
from losses.triton.matryoshka.setup import MatryoshkaSetup, PrefixBlock, sum_sizes


def inverse_lengths(setup: MatryoshkaSetup, side: Tensor) -> Tensor:
    """[prefixes, rows]: 1 / length of each prefix of packed operands, or 0 if the prefix is zero."""
    from losses.triton.kernels.matryoshka.lengths import inverse_lengths_kernel

    found = torch.empty(len(setup.prefixes.dims), len(side), device=side.device)
    if len(side):
        inverse_lengths_kernel[(-(-len(side) // 32),)](
            side, found, len(side), **setup.slices(), WIDTH=setup.layout.width, BLOCK_ROWS=32, BLOCK_D=64
        )
    return found


def raise_lowest_positive(
    setup: MatryoshkaSetup,
    bounds: Tensor,
    query: Tensor,
    passage: Tensor,
    positive: Tensor,
    logit_scale: Tensor,
    inverse: Tensor,
) -> None:
    """Raise bounds[2] to minus the lowest score of a positive among the passages.

    `inverse` are the inverse lengths of the queries.
    """
    from losses.triton.kernels.matryoshka.lengths import lowest_positive_kernel

    lowest_positive_kernel[(-(-len(query) // 32),)](
        query,
        passage,
        positive,
        logit_scale,
        inverse,
        inverse_lengths(setup, passage),
        bounds,
        len(query),
        len(passage),
        **setup.slices(),
        WIDTH=setup.layout.width,
        BLOCK_ROWS=32,
        BLOCK_D=64,
    )


def add_prefix_sums(
    setup: MatryoshkaSetup, block: PrefixBlock, statistics: list[SavedStatistics], score: Tensor, workspace: int
) -> None:
    """Add a block to the statistics of each prefix, and store the positives' scores in `score` [prefixes, M].

    `workspace` is the size of the workspace in bytes.
    """
    from losses.triton.kernels.matryoshka.sums import prefix_sums_kernel

    kernel_batch, shape, prefixes = block.kernel_batch, setup.shapes["prefix_sums"], len(setup.prefixes.dims)
    queries, passages = len(kernel_batch.query), len(kernel_batch.passage)
    launches = list(forward_blocks(queries, passages, 0, workspace // prefixes, shape.block_m, shape.block_n))
    sizes = [sum_sizes(span_length(rows), span_length(columns), shape) for rows, columns, _ in launches]
    sums, maxima = score.new_empty(2, prefixes * max(sum(each) for each in sizes))
    for (rows, columns, _), (row_size, column_size) in zip(launches, sizes, strict=True):
        height, width = span_length(rows), span_length(columns)
        row_tiles, column_tiles = -(-height // shape.block_m), -(-width // shape.block_n)
        column_offset = prefixes * row_size
        for safe in (True, False):
            prefix_sums_kernel[(row_tiles * column_tiles,)](
                *setup.operands(kernel_batch, rows, columns, shape),
                block.query_inverse,
                block.passage_inverse,
                block.bounds,
                block.logit_scale,
                block.positive,
                kernel_batch.query_ids,
                kernel_batch.passage_ids,
                score,
                sums,
                maxima,
                sums[column_offset:],
                maxima[column_offset:],
                *kernel_batch.excluded_arguments,
                height,
                width,
                rows.start,
                columns.start,
                queries,
                passages,
                SAFE=safe,
                maxnreg=setup.sums_registers if kernel_batch.dtype.itemsize == 2 else None,
                **block.options(),
                **setup.tile_options(shape),
            )
        for p, of_prefix in enumerate(statistics):
            of_rows, of_columns = p * row_size, column_offset + p * column_size
            tiles = TileSums(sums[of_rows:], maxima[of_rows:], sums[of_columns:], maxima[of_columns:])
            tiles.merge_into(
                of_prefix.block(rows, columns), block.logit_scale, row_tiles, column_tiles, block.symmetric
            )
