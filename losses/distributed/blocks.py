"""Scores of one rank's queries against a block of passages: one interface for Triton kernels and for tiles in PyTorch.

The exchange (distributed/ring.py, distributed/gather.py) moves blocks and sums between ranks. The backends
(distributed/triton_blocks.py, distributed/torch_blocks.py) compute one block and do not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch
from losses.precision import GradientSums
from losses.torch_tiles.masks import NegativeMasks, PairGradients


@dataclass(frozen=True)
class PassageBlock:
    """Consecutive passages of the pool, as they are sent.

    Attributes:
        passage: [n, width], in the operand dtype.
        ids: [n] int64, or None.
        first: Row of the pool at which the block begins.
        guide: [n, G] embeddings of the guide, as they are sent, or None.
        extras: Further rows that move with the passages, [n, …] each: `BlockBackend.own_extras`.
    """

    passage: Tensor
    ids: Tensor | None
    first: int
    guide: Tensor | None = None
    extras: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """The tensors to send."""
        return [tensor for tensor in (self.passage, self.ids, self.guide, *self.extras) if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor], first: int) -> PassageBlock:
        """The block that begins at row `first`, with `function` of each of its tensors."""
        ids, guide = (None if each is None else function(each) for each in (self.ids, self.guide))
        extras = tuple(function(extra) for extra in self.extras)
        return PassageBlock(function(self.passage), ids, first, guide, extras)


@dataclass(frozen=True)
class PartialSums:
    """Partial softmax sums of rows or columns of S.

    `table` is [kinds, size], or [kinds, prefixes, size] with several scores for each pair; its first rows are the shift
    and Σ exp(S − shift).
    """

    table: Tensor

    @property
    def shift(self) -> Tensor:
        return self.table[0]

    @property
    def total(self) -> Tensor:
        return self.table[1]


class RowSums(PartialSums):
    """[kinds, …, M]: shift and sum over passages for each query, the score of its positive, and what a backend adds."""

    @property
    def score(self) -> Tensor:
        return self.table[2]


class ColumnSums(PartialSums):
    """[4, …, n]: sums for each passage, which are sent between ranks.

    The rows are the shift, the sum over queries, the number of queries whose positive the passage is, and the sum of
    the scores of those queries with it.
    """

    @property
    def positive_count(self) -> Tensor:
        return self.table[2]


@dataclass(frozen=True)
class GradientWeights:
    """Factors that turn exp(S − shift) into ds_scale · M · dS.

    Attributes:
        row: [M], or [prefixes, M].
        column: [n], or [prefixes, n], for the passages of a block, or None if the loss is not symmetric.
        ds_scale: 0-dim, the factor of dS.
    """

    row: Tensor
    column: Tensor | None
    ds_scale: Tensor


@dataclass(frozen=True)
class GradientFactors:
    """What turns sums of ds_scale · M · dS products into gradients.

    Attributes:
        ds_scale: 0-dim, the factor of dS.
        upstream: 0-dim, the gradient of the loss.
        share: The loss is `share` times the sum over queries.
    """

    ds_scale: Tensor
    upstream: Tensor
    share: float


class BlockBackend(Protocol):
    """Computes one rank's queries against blocks of passages.

    Constructed from (batch, precision, workspace_bytes, first_passage): `batch.positive` are rows of the whole pool,
    and `first_passage` is the row of the pool at which this rank's passages begin. Gradient sums have `width` columns.
    Shifts are exponents of e or of 2.

    With `masks`, the tiles hold exponents (logit_scale + hardness) · q_i · k_j of negatives alone, sums are over
    negatives, and scores of positives are not stored. `accumulate_gradients` then writes `pair_gradients` into the
    tiles instead of subtracting 1 at the positives.
    """

    batch: ContrastiveBatch
    """Without embeddings that backward does not need."""
    query: Tensor
    width: int
    exponent_unit: float
    """Logarithm of the base of the exponents: 1 or log 2."""
    masks: NegativeMasks | None
    pair_gradients: PairGradients | None
    row_kinds: int
    """Number of sums for each query: 3, or more with the backend's own."""

    def own_extras(self) -> tuple[Tensor, ...]:
        """What moves with this rank's passages beside embeddings and ids; [N, …] each."""

    def prepare_passages(self, passage: Tensor) -> Tensor:
        """[n, D] -> [n, width], in the operand dtype."""

    def pair_products(self, query: Tensor, passage: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        """Write the product of query row and passage column to products [P], in place, if the column is in the block.

        Both sides are operands. The kernels' product has the same bits as in a tile.
        """

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        """[4], bounds of this rank's scores; their maximum over ranks is passed to `set_bounds`."""

    def set_bounds(self, bounds: Tensor) -> None:
        """Choose the shift of the exponentials from the bounds of all ranks; the choice is the same on all of them."""

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        """[kinds, size] or [kinds, prefixes, size]: the table of partial sums before the first block."""

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        """Add a block to the row sums and, if symmetric, to its column sums.

        Also stores the scores of the positives that are in the block.
        """

    def merge_columns(self, one: ColumnSums, other: ColumnSums) -> ColumnSums:
        """Column sums over the queries of both arguments; may overwrite one of them."""

    def rescale_columns(self, columns: ColumnSums, before: Tensor) -> None:
        """Rescale column sums from the shifts `before` [n] to their present, larger shifts."""

    def log_sums(self, sums: PartialSums) -> Tensor:
        """[size]: log Σ exp(S) of finished sums, to the base e; minus infinity for a sum of zero."""

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        """0-dim float64: the sum of the row losses; with columns, half the sum of row and column losses.

        NaN if the bounds given to `set_bounds` report a value that is not finite.
        """

    def choose_ds_scale(self, positive_count: Tensor | None) -> Tensor:
        """0-dim: the power of two that dS is multiplied by, if at most `positive_count` queries share a positive."""

    def gradient_weights(self, rows: RowSums, columns: ColumnSums | None, ds_scale: Tensor) -> GradientWeights:
        """The weight of each row in the loss divided by its sum, and the same for columns.

        A column counts once for each query whose positive it is.
        """

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        """Add ds_scale · M · dS K and ds_scale · M · dSᵀ Q of a block to the sums."""

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scale finished sums to gradients.

        Args:
            sums: [size, width]; may be overwritten.
            dtype: Dtype of the returned gradient [size, D], or None to return none.
            scale: Whether to return the gradient of logit_scale too; `sums` must then be those of the queries.
            of_queries: Whether `sums` are those of this rank's queries; otherwise they are those of its passages.
        """
