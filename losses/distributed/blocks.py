"""The tiles of one rank's queries with any block of passages: one interface to kernels and to tiles in PyTorch.

The exchange over ranks (distributed/ring.py, distributed/gather.py) moves blocks and statistics and knows nothing of
tiles; what computes them (distributed/triton_blocks.py, distributed/torch_blocks.py) knows nothing of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PassageBlock:
    """Consecutive passages of the pool, as they backward: [n, width] in the products' precision, ids [n] or None."""

    passage: Tensor
    ids: Tensor | None
    first: int

    def tensors(self) -> list[Tensor]:
        return [self.passage] if self.ids is None else [self.passage, self.ids]


@dataclass(frozen=True)
class PartialSums:
    """Of some size of S, as one tensor [kinds, size]: sums Σ exp(S − shift), the shift and the sum first."""

    table: Tensor

    @property
    def shift(self) -> Tensor:
        return self.table[0]

    @property
    def total(self) -> Tensor:
        return self.table[1]


class RowSums(PartialSums):
    """Of M queries, [3, M]: sums over passages, and the scores of the positives."""

    @property
    def score(self) -> Tensor:
        return self.table[2]


class ColumnSums(PartialSums):
    """Of n passages, [4, n], which backward: sums over queries, how many queries own each passage as their positive, and
    the sum of those queries' scores with it."""

    @property
    def positive_count(self) -> Tensor:
        return self.table[2]


@dataclass(frozen=True)
class GradientWeights:
    """What turns exp(S − shift) into ds_scale · M · dS: of queries [M], of a block's passages [n], and the ds_scale itself."""

    row: Tensor
    column: Tensor | None
    ds_scale: Tensor


class BlockBackend(Protocol):
    """Scores of this rank's queries with blocks of passages, `batch.positive` being rows of the whole pool.

    Made from (batch, precision, workspace_bytes, row of the pool at which this rank's own passages begin). Sums of
    queries and passages are `width` wide. What exponents are is for the tiles alone to know.
    """

    query: Tensor
    width: int

    def prepare_passages(self, passage: Tensor) -> Tensor:
        """[n, D] -> [n, width] as it travels."""

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        """[4] how large scores of this rank may get; the largest over ranks goes to `set_bounds`."""

    def set_bounds(self, bounds: Tensor) -> None:
        """Decide by the bounds of all ranks how exponentials are shifted; the same on all of them."""

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        """[kinds, size]: the table that sums of size begin with."""

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        """Add a block's exponentials to the rows' sums and, where symmetric, its columns'; find positives' scores."""

    def merge_columns(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        """The sums over the queries of both; it may stand where one of them stood."""

    def rescale_columns(self, columns: ColumnSums, before: Tensor) -> None:
        """Bring the sums, which are under shifts `before` [n], under the columns' present ones, which are higher."""

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        """0-dim float64: the row losses of all queries; with columns, half of them and half the columns' positive_count'. NaN
        where `set_bounds` was told of a number that is not finite."""

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        """0-dim: the power of two that dS is multiplied with, where at most `positive_count` queries own one passage."""

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        """A line's share of the loss over its sum; of a column once for each query that owns it."""

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        query_sum: Tensor | None,
        passage_sum: Tensor | None,
        first: bool,
    ) -> None:
        """Add ds_scale · M · dS K to query_sum [M, width], over which it is written at the `first` of all blocks; write
        its transposed product to passage_sum [n, width]."""

    def finish_gradient(
        self, sums: Tensor, ds_scale: Tensor, upstream: Tensor, share: float, dtype: torch.dtype | None, scale: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """[size, D] in dtype, if one is given, from finished sums, where the loss is `share` · Σ M · loss: the sums
        may be used up. With `scale`, for which they must be the queries', also the gradient of logit_scale."""
