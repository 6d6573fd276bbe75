"""Matryoshka scores of one rank's queries against a block of passages by Triton kernels.

The equations are in torch_matryoshka.py, the kernels in triton/kernels/matryoshka.py. Shifts and scores are exponents
of 2. With half-precision operands a kernel of our own multiplies the slices of all prefixes at once, because one slice
has too few columns to fill the multiprocessors. With float32 operands cuBLAS multiplies slice by slice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.distributed.blocks import ColumnSums, GradientWeights, PassageBlock, RowSums
from losses.distributed.objectives.torch_matryoshka import weighted_loss_sum
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.option_checks.objective import Prefixes
from losses.precision import Precision, add_product
from losses.triton.block_sizes import CUBLAS_TILE_ROWS, MAX_BLOCK_SIDE, forward_blocks, round_up, spans
from losses.triton.kernel_batch import round_up_to_16_bytes, span_length
from losses.triton.launch import operand_dtype, product_of
from losses.triton.prefix_layout import PrefixLayout
from losses.triton.shapes import tile_shape

LN_2 = math.log(2)


class TritonMatryoshkaBackend(TritonBackend):
    """`BlockBackend` for prefixes of the embeddings; tables have a dimension of prefixes."""

    own_products_bytes = 2
    """Largest operand, in bytes, whose slices our own kernel multiplies; cuBLAS multiplies larger ones."""
    sums_registers: int | None = 168
    """Registers per thread of the forward kernel for operands in half precision, so that three programs fit on a
    multiprocessor; None leaves them to the compiler."""
    gradient_registers: int | None = 168
    """The same for the backward kernel."""

    def __init__(
        self,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        first_passage: int,
        prefixes: Prefixes,
    ) -> None:
        dtype = torch.float32 if batch.query.dtype == torch.float16 else batch.query.dtype
        kernel_dtype = operand_dtype(dtype, precision)
        self._prefixes = prefixes
        self._product = product_of(precision, kernel_dtype)
        self._shapes = {
            name: tile_shape(name, batch.query.shape[1], kernel_dtype, self._product, batch.query.device)
            for name in ("prefix_sums", "prefix_gradient", "prefix_products")
        }
        self._layout = PrefixLayout.of(
            prefixes, min(self._shapes[name].block_k for name in ("prefix_sums", "prefix_gradient"))
        )
        super().__init__(batch, precision, workspace_bytes, first_passage)
        # The sums have a further column for each prefix, in whole 16 bytes.
        self.width = self._layout.width + round_up(len(prefixes.dims), 4)
        self._weights = prefixes.weight_column(batch.logit_scale)
        self._query_inverse = self._inverse_lengths(self.query)
        self._own_passage = self.query[:0]

    def prepare_passages(self, passage: Tensor) -> Tensor:
        return self._layout.pack(passage, self.precision)

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        from losses.triton.kernels.matryoshka import lowest_positive_kernel

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
            lowest_positive_kernel[(-(-len(self.query) // 32),)](
                self.query,
                own.passage,
                self.batch.positive - own.first,
                self.batch.logit_scale,
                self._query_inverse,
                self._inverse_lengths(own.passage),
                bounds,
                len(self.query),
                len(own.passage),
                STARTS=self._layout.starts,
                ENDS=self._layout.ends,
                WIDTH=self._layout.width,
                BLOCK_ROWS=32,
                BLOCK_D=64,
            )
        return bounds

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        prefixes = len(self._prefixes.dims)
        return super().initial_sums(kinds, prefixes * size).view(kinds, prefixes, size)

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        from losses.triton.kernels.matryoshka import prefix_sums_kernel
        from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES, merge_sums_kernel

        batch, kernel_batch = self.batch, self._kernel_batch(block)
        passage_inverse = self._inverse_lengths(block.passage)
        positive, diagonal = self._block_positive(block)
        shape, prefixes = self._shapes["prefix_sums"], len(self._prefixes.dims)
        queries, passages = len(self.query), len(block.passage)
        launches = list(
            forward_blocks(queries, passages, 0, self.workspace_bytes // prefixes, shape.block_m, shape.block_n)
        )
        sizes = [_sum_sizes(r, c, shape.block_m, shape.block_n) for r, c, _ in launches]
        sums, maxima = rows.table.new_empty(2, prefixes * max(sum(each) for each in sizes))
        for (span, place, _), (row_size, column_size) in zip(launches, sizes, strict=True):
            height, width = span_length(span), span_length(place)
            row_tiles, column_tiles = -(-height // shape.block_m), -(-width // shape.block_n)
            column_offset = prefixes * row_size
            for safe in (True, False):
                prefix_sums_kernel[(row_tiles * column_tiles,)](
                    kernel_batch.descriptor(self.query[span], shape.block_m, self._layout.step),
                    kernel_batch.descriptor(block.passage[place], shape.block_n, self._layout.step),
                    self._query_inverse,
                    passage_inverse,
                    self._bounds,
                    batch.logit_scale,
                    positive,
                    kernel_batch.query_ids,
                    kernel_batch.passage_ids,
                    rows.score,
                    sums,
                    maxima,
                    sums[column_offset:],
                    maxima[column_offset:],
                    *kernel_batch.excluded_arguments,
                    height,
                    width,
                    span.start,
                    place.start,
                    queries,
                    passages,
                    STARTS=self._layout.starts,
                    ENDS=self._layout.ends,
                    BLOCK_M=shape.block_m,
                    BLOCK_N=shape.block_n,
                    BLOCK_K=self._layout.step,
                    GROUP=shape.group,
                    PRODUCT=self._product,
                    SAFE=safe,
                    SYMMETRIC=batch.symmetric,
                    DIAGONAL=diagonal,
                    HAS_IDS=kernel_batch.has_ids,
                    HAS_EXCLUDED=kernel_batch.has_excluded,
                    num_warps=shape.warps,
                    num_stages=shape.stages,
                    maxnreg=self.sums_registers if kernel_batch.dtype.itemsize == 2 else None,
                )
            size = max(height, width) if batch.symmetric else height
            for p in range(prefixes):
                of_rows, of_columns = p * row_size, column_offset + p * column_size
                merge_sums_kernel[(-(-size // MERGE_BLOCK), 2 if batch.symmetric else 1)](
                    self._bounds,
                    batch.logit_scale,
                    rows.total[p, span],
                    rows.shift[p, span],
                    sums[of_rows:],
                    maxima[of_rows:],
                    height,
                    column_tiles,
                    columns.total[p, place],
                    columns.shift[p, place],
                    sums[of_columns:],
                    maxima[of_columns:],
                    width,
                    row_tiles,
                    BLOCK=MERGE_BLOCK,
                    TILES=MERGE_TILES,
                )

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
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
        first: bool,
        add: bool = False,
    ) -> None:
        from losses.triton.kernels.matryoshka import add_along_kernel, prefix_gradient_kernel
        from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES

        batch, kernel_batch, layout = self.batch, self._kernel_batch(block), self._layout
        passage_inverse = self._inverse_lengths(block.passage)
        positive, diagonal = self._block_positive(block)
        shape, prefixes = self._shapes["prefix_gradient"], len(self._prefixes.dims)
        queries, passages = len(self.query), len(block.passage)
        side = self._block_side()
        column_weight = weights.row if weights.column is None else weights.column
        tallest, widest = min(queries, side), min(passages, side)
        workspace = self.query.new_empty(
            prefixes * round_up(tallest, shape.block_m) * round_up_to_16_bytes(widest, kernel_batch.dtype)
        )
        along = rows.table.new_empty(
            prefixes * sum(_sum_sizes(slice(0, tallest), slice(0, widest), shape.block_m, shape.block_n))
        )
        for span in spans(0, queries, side):
            for place in spans(0, passages, side):
                height, width = span_length(span), span_length(place)
                row_tiles, column_tiles = -(-height // shape.block_m), -(-width // shape.block_n)
                stride, pitch = row_tiles * shape.block_m, round_up_to_16_bytes(width, kernel_batch.dtype)
                gradient = workspace[: prefixes * stride * pitch].view(prefixes * stride, pitch)[:, :width]
                column_along = along[prefixes * height * column_tiles :]
                for safe in (True, False):
                    prefix_gradient_kernel[(row_tiles * column_tiles,)](
                        kernel_batch.descriptor(self.query[span], shape.block_m, layout.step),
                        kernel_batch.descriptor(block.passage[place], shape.block_n, layout.step),
                        kernel_batch.descriptor(gradient, shape.block_m, shape.block_n // 2),
                        self._query_inverse,
                        passage_inverse,
                        self._bounds,
                        batch.logit_scale,
                        self._weights,
                        positive,
                        kernel_batch.query_ids,
                        kernel_batch.passage_ids,
                        weights.row,
                        rows.shift,
                        column_weight,
                        column_shift,
                        along,
                        column_along,
                        *kernel_batch.excluded_arguments,
                        height,
                        width,
                        span.start,
                        place.start,
                        queries,
                        passages,
                        stride,
                        STARTS=layout.starts,
                        ENDS=layout.ends,
                        BLOCK_M=shape.block_m,
                        BLOCK_N=shape.block_n,
                        BLOCK_K=layout.step,
                        GROUP=shape.group,
                        PRODUCT=self._product,
                        SAFE=safe,
                        SYMMETRIC=batch.symmetric,
                        DIAGONAL=diagonal,
                        HAS_IDS=kernel_batch.has_ids,
                        HAS_EXCLUDED=kernel_batch.has_excluded,
                        PACKED=kernel_batch.dtype == torch.bfloat16,
                        num_warps=shape.warps,
                        num_stages=shape.stages,
                        maxnreg=self.gradient_registers if kernel_batch.dtype.itemsize == 2 else None,
                    )
                of_queries = None if query_sum is None else query_sum[span]
                of_passages = None if passage_sum is None else passage_sum[place]
                query_first, passage_first = first and not place.start, not add and not span.start
                for target, source, tiles, again in (
                    (of_queries, along, column_tiles, query_first),
                    (of_passages, column_along, row_tiles, passage_first),
                ):
                    if target is not None:
                        add_along_kernel[(-(-len(target) // MERGE_BLOCK), prefixes)](
                            source,
                            target[:, layout.width :],
                            self.width,
                            len(target),
                            tiles,
                            int(again),
                            BLOCK=MERGE_BLOCK,
                            TILES=MERGE_TILES,
                        )
                self._add_products(
                    gradient, stride, self.query[span], block.passage[place], of_queries, of_passages, query_first,
                    passage_first,
                )  # fmt: skip

    def _add_products(
        self,
        gradient: Tensor,
        stride: int,
        query: Tensor,
        passage: Tensor,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
        query_first: bool,
        passage_first: bool,
    ) -> None:
        """Add the products of the sums H_n in `gradient` with the slices of a block's embeddings."""
        layout = self._layout
        if query.dtype.itemsize <= self.own_products_bytes:
            self._launch_products(gradient, stride, query, passage, query_sum, passage_sum, query_first, passage_first)
            return
        for n, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
            factor = gradient[n * stride : n * stride + len(query)]
            if query_sum is not None:
                add_product(query_sum[:, start:end], factor, passage[:, start:end], first=query_first)
            if passage_sum is not None:
                add_product(passage_sum[:, start:end], factor.T, query[:, start:end], first=passage_first)

    def _launch_products(
        self,
        gradient: Tensor,
        stride: int,
        query: Tensor,
        passage: Tensor,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
        query_first: bool,
        passage_first: bool,
    ) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        from losses.triton.kernels.matryoshka import slice_products_kernel

        shape, layout = self._shapes["prefix_products"], self._layout
        block_n = layout.tile_columns(shape.block_n)
        tiles = layout.width // block_n
        query_tiles = 0 if query_sum is None else -(-len(query) // shape.block_m) * tiles
        passage_tiles = 0 if passage_sum is None else -(-len(passage) // shape.block_m) * tiles
        # A side without a sum has no tiles, and its descriptor is not used.
        query_target = passage_sum if query_sum is None else query_sum
        passage_target = query_sum if passage_sum is None else passage_sum
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
            int(query_first),
            int(passage_first),
            STARTS=layout.starts,
            ENDS=layout.ends,
            TILES=tiles,
            BLOCK_M=shape.block_m,
            BLOCK_N=block_n,
            BLOCK_K=shape.block_k,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )

    def finish_gradient(
        self,
        sums: Tensor,
        ds_scale: Tensor,
        upstream: Tensor,
        share: float,
        dtype: torch.dtype | None,
        scale: bool,
        of_queries: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        from losses.triton.kernels.matryoshka import prefix_epilogue_kernel

        layout, prefixes = self._layout, self._prefixes
        along = sums[:, layout.width : layout.width + len(prefixes.dims)]
        of_scale = along.sum() * (upstream.float() * share) if scale else None
        if dtype is None:
            return None, of_scale
        side = self.query if of_queries else self._own_passage
        out = sums.new_empty(len(sums), self._dimensions, dtype=dtype)
        if prefixes.dims[-1] < self._dimensions:
            out.zero_()
        if len(sums):
            rows = 8 if sums.is_cuda else 64
            prefix_epilogue_kernel[(-(-len(sums) // rows),)](
                sums,
                self.width,
                side,
                self._query_inverse if of_queries else self._inverse_lengths(side),
                out,
                self._dimensions,
                self.batch.logit_scale,
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
        return out, of_scale

    def _inverse_lengths(self, side: Tensor) -> Tensor:
        """[prefixes, rows]: 1 / length of each prefix of packed operands, or 0 if the prefix is zero."""
        from losses.triton.kernels.matryoshka import inverse_lengths_kernel

        found = torch.empty(len(self._prefixes.dims), len(side), device=side.device)
        if len(side):
            inverse_lengths_kernel[(-(-len(side) // 32),)](
                side,
                found,
                len(side),
                STARTS=self._layout.starts,
                ENDS=self._layout.ends,
                WIDTH=self._layout.width,
                BLOCK_ROWS=32,
                BLOCK_D=64,
            )
        return found

    def _block_side(self) -> int:
        """Rows and columns of the blocks whose gradients fit the workspace, for all slices."""
        shape, prefixes = self._shapes["prefix_gradient"], len(self._prefixes.dims)
        entry = prefixes * (self.query.dtype.itemsize + 4 / shape.block_m + 4 / shape.block_n)
        side = math.isqrt(int(self.workspace_bytes / entry)) // CUBLAS_TILE_ROWS * CUBLAS_TILE_ROWS
        return min(MAX_BLOCK_SIDE, max(CUBLAS_TILE_ROWS, side))


def _sum_sizes(rows: slice, columns: slice, block_m: int, block_n: int) -> tuple[int, int]:
    """Number of row sums and of column sums of all tiles of a block, for one prefix."""
    height, width = span_length(rows), span_length(columns)
    return height * -(-width // block_n), width * -(-height // block_m)


def _in_nats(table: Tensor, kinds: tuple[int, ...]) -> Tensor:
    """A copy in which shifts and scores, the rows `kinds`, are exponents of e."""
    table = table.clone()
    for kind in kinds:
        table[kind] *= LN_2
    return table
