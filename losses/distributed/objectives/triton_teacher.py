"""InfoNCE and distillation from a teacher's embeddings, for one rank's queries, by Triton kernels.

The equations are in torch_teacher.py, the kernels in triton/kernels/teacher.py. Shifts, scores and the differences
T − S are exponents of 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses.distributed.blocks import ColumnSums, GradientWeights, PassageBlock, RowSums
from losses.distributed.objectives.torch_teacher import divergences
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.options import Teacher
from losses.precision import GradientSums, Precision
from losses.triton.block_launches import SavedStatistics, TileSums
from losses.triton.block_sizes import forward_blocks, spans
from losses.triton.kernel_batch import KernelBatch, round_up_to_16_bytes, span_length
from losses.triton.launch import operand
from losses.triton.shapes import TileShape

LN_2 = math.log(2)
# As MAX_EXPONENT of triton/kernels/tile.py, for scores whose lowest value is minus their highest.
MAX_SAFE_SCORE = 60.0


class TritonTeacherBackend(TritonBackend):
    """`BlockBackend` whose rows also have the divergence from a teacher."""

    row_kinds = 6

    def __init__(
        self,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        first_passage: int,
        teacher: Teacher,
    ) -> None:
        super().__init__(batch, precision, workspace_bytes, first_passage)
        self.teacher = teacher
        self._teacher_query = self.prepare_passages(teacher.query)
        self._constants = torch.empty(0)

    def prepare_passages(self, passage: Tensor) -> Tensor:
        # float16 cannot represent most probabilities, and the divergence has no bound to choose a factor by.
        return operand(passage.float() if passage.dtype == torch.float16 else passage, self.precision)

    def own_extras(self) -> tuple[Tensor, ...]:
        return (self.prepare_passages(self.teacher.passage),)

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        bounds = super().score_bounds(own, positives_local)
        lengths = [
            torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() if len(side) else bounds.new_zeros(())
            for side in (self._teacher_query, *own.extras)
        ]
        return torch.cat([bounds, torch.stack(lengths)])

    def set_bounds(self, bounds: Tensor) -> None:
        super().set_bounds(bounds)
        highest = bounds[4] * bounds[5] * abs(self.teacher.scale)
        # The kernels use constant shifts only if bounds[2] allows it.
        self._bounds[2] = torch.where(highest <= MAX_SAFE_SCORE, self._bounds[2], torch.inf)
        # Lists would be copied from pageable memory, for which the host waits.
        self._constants = highest.new_zeros(2)
        self._constants[0] = self.teacher.scale / LN_2

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        from losses.triton.kernels.statistics import MERGE_BLOCK, MERGE_TILES
        from losses.triton.kernels.teacher import merge_teacher_kernel, teacher_sums_kernel

        batch, kernel_batch = self.batch, self._kernel_batch(block)
        positive, diagonal = self._block_positive(block)
        shape = kernel_batch.shape("teacher_sums")
        launches = list(
            forward_blocks(
                len(self.query), len(block.passage), 0, self.workspace_bytes // 2, shape.block_m, shape.block_n
            )
        )
        row_sizes = [span_length(r) * -(-span_length(c) // shape.block_n) for r, c, _ in launches]
        column_sizes = [span_length(c) * -(-span_length(r) // shape.block_m) for r, c, _ in launches]
        row_sum, row_max, teacher_sum, teacher_max, difference = rows.table.new_empty(5, max(row_sizes))
        tile_sums = TileSums(row_sum, row_max, *rows.table.new_empty(2, max(column_sizes)))
        statistics = SavedStatistics(self._bounds, rows.score, rows.total, rows.shift, columns.total, columns.shift)
        for span, column_span, _ in launches:
            height, width = span_length(span), span_length(column_span)
            for safe in (True, False):
                teacher_sums_kernel[shape.grid(height, width, kernel_batch.processors)](
                    *self._descriptors(kernel_batch, block, span, column_span, shape),
                    self._bounds,
                    batch.logit_scale,
                    self._constants,
                    positive,
                    kernel_batch.query_ids,
                    kernel_batch.passage_ids,
                    rows.score,
                    tile_sums.row_sum,
                    tile_sums.row_max,
                    tile_sums.column_sum,
                    tile_sums.column_max,
                    teacher_sum,
                    teacher_max,
                    difference,
                    *kernel_batch.excluded_arguments,
                    height,
                    width,
                    span.start,
                    column_span.start,
                    SAFE=safe,
                    **self._options(kernel_batch, block, shape, diagonal),
                )
            row_tiles, column_tiles = -(-height // shape.block_m), -(-width // shape.block_n)
            tile_sums.merge_into(
                statistics.block(span, column_span), batch.logit_scale, row_tiles, column_tiles, batch.symmetric
            )
            merge_teacher_kernel[(-(-height // MERGE_BLOCK),)](
                self._bounds,
                batch.logit_scale,
                self._constants,
                rows.table[4, span],
                rows.table[3, span],
                rows.table[5, span],
                teacher_sum,
                teacher_max,
                difference,
                height,
                column_tiles,
                BLOCK=MERGE_BLOCK,
                TILES=MERGE_TILES,
            )

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        loss = super().loss_sum(rows, columns)
        in_nats = rows.table.clone()
        for kind in (0, 3, 5):
            in_nats[kind] *= LN_2
        return loss + self.teacher.weight * divergences(RowSums(in_nats)).sum(dtype=torch.float64)

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        found = super().gradient_weights(rows, columns, ds_scale)
        return GradientWeights(found.row + self.teacher.weight / rows.total, found.column, found.ds_scale)

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        from losses.triton.kernels.teacher import teacher_gradient_kernel

        kernel_batch = self._kernel_batch(block)
        positive, diagonal = self._block_positive(block)
        shape, blocks = kernel_batch.shape("teacher_gradient"), kernel_batch.blocks
        teacher_weight = self.teacher.weight / rows.table[4]
        workspace = self.query.new_empty(blocks.rows * round_up_to_16_bytes(blocks.columns, kernel_batch.dtype))
        for span in spans(0, len(self.query), blocks.rows):
            for column_span in spans(0, len(block.passage), blocks.columns):
                height, width = span_length(span), span_length(column_span)
                pitch = round_up_to_16_bytes(width, kernel_batch.dtype)
                gradient = workspace[: height * pitch].view(height, pitch)[:, :width]
                for safe in (True, False):
                    teacher_gradient_kernel[shape.grid(height, width, kernel_batch.processors)](
                        *self._descriptors(kernel_batch, block, span, column_span, shape),
                        kernel_batch.descriptor(gradient, shape.block_m, shape.block_n),
                        self._bounds,
                        self.batch.logit_scale,
                        self._constants,
                        positive,
                        kernel_batch.query_ids,
                        kernel_batch.passage_ids,
                        weights.row,
                        rows.shift,
                        weights.row if weights.column is None else weights.column,
                        column_shift,
                        teacher_weight,
                        rows.table[3],
                        *kernel_batch.excluded_arguments,
                        height,
                        width,
                        span.start,
                        column_span.start,
                        SAFE=safe,
                        **self._options(kernel_batch, block, shape, diagonal),
                    )
                sums.block(span, column_span).add(gradient, kernel_batch.query[span], kernel_batch.passage[column_span])

    def _descriptors(
        self, kernel_batch: KernelBatch, block: PassageBlock, rows: slice, columns: slice, shape: TileShape
    ) -> list[object]:
        """Descriptors of query, passage and the teacher's query and passage."""
        (teacher_passage,) = block.extras
        sides = ((kernel_batch.query, kernel_batch.passage), (self._teacher_query, teacher_passage))
        found: list[object] = []
        for query, passage in sides:
            found.append(kernel_batch.descriptor(query[rows], shape.block_m, shape.block_k))
            found.append(kernel_batch.descriptor(passage[columns], shape.block_n, shape.block_k))
        return found

    def _options(
        self, kernel_batch: KernelBatch, block: PassageBlock, shape: TileShape, diagonal: bool
    ) -> dict[str, object]:
        """Constants that both kernels take."""
        return {
            "D": kernel_batch.width,
            "TEACHER_D": self._teacher_query.shape[1],
            "PRODUCT": kernel_batch.product,
            "SYMMETRIC": self.batch.symmetric,
            "DIAGONAL": diagonal,
            "HAS_IDS": kernel_batch.has_ids,
            "HAS_EXCLUDED": kernel_batch.has_excluded,
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_K": shape.block_k,
            "GROUP": shape.group,
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }
