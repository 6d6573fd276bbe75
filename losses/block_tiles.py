"""The tiles of one rank's queries with any block of passages: one interface to the kernels and to tiles in PyTorch.

The exchange over ranks (ring.py, gathered.py) moves blocks and statistics and knows nothing of tiles; what is here
knows nothing of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from losses.batch import ContrastiveBatch, accumulator, all_finite
from losses.block_run import BlockRun, cells, padded_to_16_bytes, ranked, unit_of
from losses.block_visits import State, Weights, add_sums, score_gradient
from losses.chunked import Statistics, add_row_gradients, add_statistics, constant_shift, score_bounds
from losses.precision import Precision, add_product
from losses.tiles import ScoreTiles


@dataclass(frozen=True)
class PassageBlock:
    """Consecutive passages of the pool, as they travel: [n, width] in the products' precision, ids [n] or None."""

    passage: Tensor
    ids: Tensor | None
    first: int

    def tensors(self) -> list[Tensor]:
        return [self.passage] if self.ids is None else [self.passage, self.ids]


@dataclass(frozen=True)
class Softmax:
    """Sums Σ exp(S − shift) of some lines of S, beside the shift of each; both [lines]."""

    shift: Tensor
    total: Tensor


@dataclass(frozen=True)
class LineWeights:
    """What turns exp(S − shift) into unit · M · dS: of queries [M], of a block's passages [n], and the unit itself."""

    row: Tensor
    column: Tensor | None
    unit: Tensor


class BlockTiles(Protocol):
    """Scores of this rank's queries with blocks of passages, `batch.positive` being rows of the whole pool.

    Made from (batch, precision, workspace_bytes, row of the pool at which this rank's own passages begin). Exponents
    are natural ones divided by `natural`. Sums are of dtype `dtype`, of queries and passages `width` wide.
    """

    query: Tensor
    width: int
    dtype: torch.dtype
    natural: float

    def operand(self, passage: Tensor) -> Tensor:
        """[n, D] -> [n, width] as it travels."""

    def bounds(self, own: PassageBlock, positives_here: bool) -> Tensor:
        """[4] how large scores of this rank may get; the largest over ranks goes to `settle`."""

    def settle(self, bounds: Tensor) -> None:
        """Decide by the bounds of all ranks how exponentials are shifted; the same on all of them."""

    def no_sums(self, lines: int) -> Softmax:
        """What sums begin with."""

    def add_sums(self, block: PassageBlock, score: Tensor, rows: Softmax, columns: Softmax) -> None:
        """Add a block's exponentials to the rows' sums and, where symmetric, its columns'; find positives' scores."""

    def unit(self, owners: Tensor | None) -> Tensor:
        """0-dim: the power of two that dS is multiplied with, where at most `owners` queries own one passage."""

    def add_gradients(
        self,
        block: PassageBlock,
        score: Tensor,
        row_shift: Tensor,
        column_shift: Tensor,
        weights: LineWeights,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
    ) -> None:
        """Add unit · M · dS K to query_sum [M, width] and its transposed product to passage_sum [n, width]."""


class TiledBlocks:
    """By tiles in PyTorch, on any device (chunked.py)."""

    natural = 1.0

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, first_passage: int) -> None:
        self.batch, self.precision, self.workspace_bytes = batch, precision, workspace_bytes
        self.query = batch.query
        self.width = batch.query.shape[1]
        self.dtype = accumulator(batch.query.dtype)
        self._constant: Tensor | None = None

    def operand(self, passage: Tensor) -> Tensor:
        return (passage.to(torch.bfloat16) if self.precision == "bf16" else passage).contiguous()

    def bounds(self, own: PassageBlock, positives_here: bool) -> Tensor:
        return score_bounds(self._tiles(own), all_positives_here=positives_here)

    def settle(self, bounds: Tensor) -> None:
        if self.batch.symmetric and bounds.device.type == "cpu":
            self._constant = constant_shift(bounds, self.batch.logit_scale)

    def no_sums(self, lines: int) -> Softmax:
        zeros = self.query.new_zeros(lines, dtype=self.dtype)
        lowest = torch.full_like(zeros, torch.finfo(self.dtype).min)
        return Softmax(lowest if self._constant is None else lowest.copy_(self._constant), zeros)

    def add_sums(self, block: PassageBlock, score: Tensor, rows: Softmax, columns: Softmax) -> None:
        add_statistics(self._tiles(block), self._statistics(score, rows, columns))

    def unit(self, owners: Tensor | None) -> Tensor:
        return self.query.new_ones((), dtype=self.dtype)

    def add_gradients(
        self,
        block: PassageBlock,
        score: Tensor,
        row_shift: Tensor,
        column_shift: Tensor,
        weights: LineWeights,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
    ) -> None:
        tiles = self._tiles(block)
        statistics = self._statistics(score, Softmax(row_shift, row_shift), Softmax(column_shift, column_shift))
        for rows in tiles.row_blocks():
            sums = None if query_sum is None else query_sum[rows]
            line_weights = (weights.row, weights.column)
            add_row_gradients(tiles, statistics, line_weights, rows, tiles.query_block(rows), sums, passage_sum)

    def _tiles(self, block: PassageBlock) -> ScoreTiles:
        batch = self.batch
        here = ContrastiveBatch(
            batch.query,
            block.passage,
            batch.logit_scale,
            batch.positive - block.first,
            batch.query_ids,
            block.ids,
            batch.symmetric,
        )
        return ScoreTiles(here, self.precision, self.workspace_bytes)

    def _statistics(self, score: Tensor, rows: Softmax, columns: Softmax) -> Statistics:
        shift, total = (columns.shift, columns.total) if self.batch.symmetric else (None, None)
        return Statistics(score, rows.shift, rows.total, shift, total, self._constant)


class FusedBlocks:
    """By Triton kernels (fused.py): exponents are of 2, and the vendor's products add blocks of dS to the sums."""

    natural = math.log(2)
    dtype = torch.float32

    def __init__(self, batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, first_passage: int) -> None:
        self.precision, self.workspace_bytes = precision, workspace_bytes
        self._first_passage = first_passage
        self.query = self.operand(batch.query)
        # The kernels read operands alone, and embeddings that wait on the host need not be here too until backward.
        self.batch = replace(batch, query=self.query, passage=self.query[:0])
        self.width = self.query.shape[1]
        self._bounds = torch.empty(0)

    def operand(self, passage: Tensor) -> Tensor:
        from losses.kernels.launch import operand

        return operand(passage, self.precision)

    def bounds(self, own: PassageBlock, positives_here: bool) -> Tensor:
        from losses.kernels.bounds import measure_bounds

        batch, bounds = self.batch, torch.zeros(4, device=self.query.device)
        if len(self.query) and len(own.passage):
            place = (batch.positive - own.first).clamp(0, len(own.passage) - 1)
            measure_bounds(self.query, own.passage, place, batch.logit_scale, bounds)
        for side, squared in ((self.query, bounds[0]), (own.passage, bounds[1])):
            if len(side) and not (len(self.query) and len(own.passage)):
                squared += torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() ** 2
                bounds[3] = (~all_finite(side)).float()
        if not positives_here and len(self.query):
            bounds[2] = torch.inf
        return bounds

    def settle(self, bounds: Tensor) -> None:
        # No positive's score is lower than minus the largest that any score may have.
        highest = bounds[0].sqrt() * bounds[1].sqrt() * self.batch.logit_scale.abs()
        bounds[2] = torch.minimum(bounds[2], highest)
        self._bounds = bounds

    def no_sums(self, lines: int) -> Softmax:
        zeros = self.query.new_zeros(lines, dtype=torch.float32)
        return Softmax(torch.full_like(zeros, torch.finfo(torch.float32).min), zeros)

    def add_sums(self, block: PassageBlock, score: Tensor, rows: Softmax, columns: Softmax) -> None:
        batch = self.batch
        state = State(self._bounds, score, rows.total, rows.shift, columns.total, columns.shift)
        place, diagonal = self._place(block)
        add_sums(self._run(block), state, batch.logit_scale, place, batch.symmetric, diagonal, self.workspace_bytes)

    def unit(self, owners: Tensor | None) -> Tensor:
        return unit_of(self.query.dtype, owners, self._bounds)

    def add_gradients(
        self,
        block: PassageBlock,
        score: Tensor,
        row_shift: Tensor,
        column_shift: Tensor,
        weights: LineWeights,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
    ) -> None:
        from losses.kernels.blocks import spans

        batch, run = self.batch, self._run(block)
        place, diagonal = self._place(block)
        of_columns = row_shift if weights.column is None else weights.column
        state = State(self._bounds, score, row_shift, row_shift, column_shift, column_shift)
        kernel_weights = Weights(weights.unit, weights.row, of_columns, batch.symmetric, diagonal)
        blocks = run.blocks
        workspace = run.query.new_empty(blocks.rows * padded_to_16_bytes(blocks.columns, run.dtype))
        for rows in spans(0, len(run.query), blocks.rows):
            for columns in spans(0, len(run.passage), blocks.columns):
                height, width = cells(rows), cells(columns)
                stride = padded_to_16_bytes(width, run.dtype)
                gradient = workspace[: height * stride].view(height, stride)[:, :width]
                score_gradient(run, state, kernel_weights, batch.logit_scale, place, rows, columns, gradient)
                if query_sum is not None:
                    add_product(query_sum[rows], gradient, run.passage[columns])
                if passage_sum is not None:
                    add_product(passage_sum[columns], gradient.T, run.query[rows])

    def _run(self, block: PassageBlock) -> BlockRun:
        ids = ranked(self.batch.query_ids, block.ids)
        return BlockRun(self.query, block.passage, *ids, self.precision, self.workspace_bytes, False)

    def _place(self, block: PassageBlock) -> tuple[Tensor, bool]:
        """The positives' places in the block, and whether they are its rows in order, which kernels need not read."""
        # `diagonal` says that query i's positive is row i of this rank's own passages: of the block that begins there.
        diagonal = self.batch.diagonal and block.first == self._first_passage
        return self.batch.positive - block.first, diagonal
