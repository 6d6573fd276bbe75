"""Backward: launches of the kernels that compute the gradients of the prefixes' scores and of the embeddings.

With half-precision operands a kernel of our own multiplies the slices of all prefixes at once, because one slice has
too few columns to fill the multiprocessors. With float32 operands cuBLAS multiplies slice by slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.precision import GradientSums
from losses.triton.block_sizes import CUBLAS_TILE_ROWS, MAX_BLOCK_SIDE, round_up, spans
from losses.triton.kernel_batch import round_up_to_16_bytes, span_length
from losses.triton.matryoshka.setup import MatryoshkaSetup, PrefixBlock, sum_sizes


@dataclass(frozen=True)
class PrefixGradientWeights:
    """Factors and shifts that turn scores of the prefixes into M · dS, and the weights of the prefixes, [prefixes].

    Those of rows are [prefixes, M], those of columns [prefixes, N]. Without a symmetric loss the columns are not read.
    """

    prefix: Tensor
    row: Tensor
    row_shift: Tensor
    column: Tensor
    column_shift: Tensor


def add_prefix_gradients(
    setup: MatryoshkaSetup, block: PrefixBlock, weights: PrefixGradientWeights, sums: GradientSums, workspace_bytes: int
) -> None:
    """Add the products of a block's gradients and, in further columns of `sums`, its sums of dS cos."""
    kernel_batch, shape, prefixes = block.kernel_batch, setup.shapes["prefix_gradient"], len(setup.prefixes.dims)
    queries, passages = len(kernel_batch.query), len(kernel_batch.passage)
    side = _block_side(setup, kernel_batch.dtype.itemsize, workspace_bytes)
    tallest, widest = min(queries, side), min(passages, side)
    workspace = kernel_batch.query.new_empty(
        prefixes * round_up(tallest, shape.block_m) * round_up_to_16_bytes(widest, kernel_batch.dtype)
    )
    along = block.query_inverse.new_empty(prefixes * sum(sum_sizes(tallest, widest, shape)))
    for rows in spans(0, queries, side):
        for columns in spans(0, passages, side):
            height, width = span_length(rows), span_length(columns)
            row_tiles, column_tiles = -(-height // shape.block_m), -(-width // shape.block_n)
            stride, pitch = row_tiles * shape.block_m, round_up_to_16_bytes(width, kernel_batch.dtype)
            gradient = workspace[: prefixes * stride * pitch].view(prefixes * stride, pitch)[:, :width]
            column_along = along[prefixes * height * column_tiles :]
            _write_gradients(setup, block, weights, rows, columns, gradient, stride, along, column_along)
            of_block = sums.block(rows, columns)
            _add_along(setup, along, of_block.query, column_tiles, of_block.overwrite_query)
            _add_along(setup, column_along, of_block.passage, row_tiles, of_block.overwrite_passage)
            _add_products(setup, gradient, stride, kernel_batch.query[rows], kernel_batch.passage[columns], of_block)


def finish_prefix_gradient(
    setup: MatryoshkaSetup,
    sums: Tensor,
    side: Tensor,
    inverse: Tensor,
    out: Tensor,
    logit_scale: Tensor,
    upstream: Tensor,
    share: float,
) -> None:
    """Write the gradients of the embeddings to `out` [rows, D]: those of the sums, across each prefix.

    Args:
        side: The packed operands, whose inverse lengths are `inverse`.
        upstream: 0-dim, the gradient of the loss.
        share: The loss is `share` times the sum over queries.
    """
    from losses.triton.kernels.matryoshka.products import prefix_epilogue_kernel

    layout, prefixes = setup.layout, setup.prefixes
    rows = 8 if sums.is_cuda else 64
    prefix_epilogue_kernel[(-(-len(sums) // rows),)](
        sums,
        sums.shape[1],
        side,
        inverse,
        out,
        setup.dimensions,
        logit_scale,
        upstream,
        share,
        len(sums),
        STARTS=layout.starts[::-1],
        OUT_STARTS=layout.out_starts[::-1],
        OUT_ENDS=prefixes.dims[::-1],
        WIDTH=layout.width,
        BLOCK_ROWS=rows,
        BLOCK_D=256,
    )


def _write_gradients(
    setup: MatryoshkaSetup,
    block: PrefixBlock,
    weights: PrefixGradientWeights,
    rows: slice,
    columns: slice,
    gradient: Tensor,
    stride: int,
    row_along: Tensor,
    column_along: Tensor,
) -> None:
    """Write the sums H_n of the slices to `gradient`, from row n · stride on, and the tiles' sums of dS cos."""
    from losses.triton.kernels.matryoshka.gradients import prefix_gradient_kernel

    kernel_batch, shape = block.kernel_batch, setup.shapes["prefix_gradient"]
    height, width = span_length(rows), span_length(columns)
    for safe in (True, False):
        prefix_gradient_kernel[(-(-height // shape.block_m) * -(-width // shape.block_n),)](
            *setup.operands(kernel_batch, rows, columns, shape),
            kernel_batch.descriptor(gradient, shape.block_m, shape.block_n // 2),
            block.query_inverse,
            block.passage_inverse,
            block.bounds,
            block.logit_scale,
            weights.prefix,
            block.positive,
            kernel_batch.query_ids,
            kernel_batch.passage_ids,
            weights.row,
            weights.row_shift,
            weights.column,
            weights.column_shift,
            row_along,
            column_along,
            *kernel_batch.excluded_arguments,
            height,
            width,
            rows.start,
            columns.start,
            len(kernel_batch.query),
            len(kernel_batch.passage),
            stride,
            SAFE=safe,
            PACKED=kernel_batch.dtype == torch.bfloat16,
            maxnreg=setup.gradient_registers if kernel_batch.dtype.itemsize == 2 else None,
            **block.options(),
            **setup.tile_options(shape),
        )


def _add_along(setup: MatryoshkaSetup, along: Tensor, target: Tensor | None, tiles: int, overwrite: bool) -> None:
    """Add the tiles' sums of dS cos [prefixes, tiles, rows] to the last columns of `target`."""
    from losses.triton.kernels.matryoshka.products import add_along_kernel
    from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES

    if target is None:
        return
    add_along_kernel[(-(-len(target) // MERGE_BLOCK), len(setup.prefixes.dims))](
        along,
        target[:, setup.layout.width :],
        target.shape[1],
        len(target),
        tiles,
        int(overwrite),
        BLOCK=MERGE_BLOCK,
        TILES=MERGE_TILES,
    )


def _add_products(
    setup: MatryoshkaSetup, gradient: Tensor, stride: int, query: Tensor, passage: Tensor, sums: GradientSums
) -> None:
    """Add the products of the sums H_n in `gradient` with the slices of a block's embeddings."""
    layout = setup.layout
    if query.dtype.itemsize <= setup.own_products_bytes:
        _launch_products(setup, gradient, stride, query, passage, sums)
        return
    for n, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
        columns = slice(start, end)
        of_slice = gradient[n * stride : n * stride + len(query)]
        sums.columns(columns).add(of_slice, query[:, columns], passage[:, columns])


def _launch_products(
    setup: MatryoshkaSetup, gradient: Tensor, stride: int, query: Tensor, passage: Tensor, sums: GradientSums
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from losses.triton.kernels.matryoshka.products import slice_products_kernel

    shape, layout = setup.shapes["prefix_products"], setup.layout
    block_n = layout.tile_columns(shape.block_n)
    tiles = layout.width // block_n
    query_tiles = 0 if sums.query is None else -(-len(query) // shape.block_m) * tiles
    passage_tiles = 0 if sums.passage is None else -(-len(passage) // shape.block_m) * tiles
    # A side without a sum has no tiles, and its descriptor is not used.
    query_target = sums.passage if sums.query is None else sums.query
    passage_target = sums.query if sums.passage is None else sums.passage
    if query_target is None or passage_target is None:
        return

    def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])

    slice_products_kernel[(query_tiles + passage_tiles,)](
        descriptor(gradient, shape.block_m, shape.block_k),
        descriptor(gradient, shape.block_k, shape.block_m),
        descriptor(passage, shape.block_k, block_n),
        descriptor(query, shape.block_k, block_n),
        descriptor(query_target, shape.block_m, block_n),
        descriptor(passage_target, shape.block_m, block_n),
        len(query),
        len(passage),
        stride,
        query_tiles,
        int(sums.overwrite_query),
        int(sums.overwrite_passage),
        **setup.slices(),
        TILES=tiles,
        BLOCK_M=shape.block_m,
        BLOCK_N=block_n,
        BLOCK_K=shape.block_k,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def _block_side(setup: MatryoshkaSetup, itemsize: int, workspace_bytes: int) -> int:
    """Rows and columns of the blocks whose gradients fit the workspace, for all slices."""
    shape, prefixes = setup.shapes["prefix_gradient"], len(setup.prefixes.dims)
    entry = prefixes * (itemsize + 4 / shape.block_m + 4 / shape.block_n)
    side = math.isqrt(int(workspace_bytes / entry)) // CUBLAS_TILE_ROWS * CUBLAS_TILE_ROWS
    return min(MAX_BLOCK_SIDE, max(CUBLAS_TILE_ROWS, side))
