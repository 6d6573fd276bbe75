"""Matryoshka scores of one rank's queries against a block of passages in PyTorch, on any device.

Let q_:d be the first d columns of a query, and cos_m = q_:d · k_:d / (‖q_:d‖ ‖k_:d‖) for the m-th prefix size d = d_m.
The scores of a prefix are logit_scale · cos_m, so one product gives all of them: it is scaled each time that its sum
reaches the end of a prefix. With dS_m, the gradient of prefix m times its weight,

    G_m = dS_m / (‖q_:d‖ ‖k_:d‖),   H_n = Σ_{m ≥ n} G_m,   e_m,i = Σ_j dS_m,ij cos_m,ij
    dQ[:, slice n] = logit_scale · (H_n K[:, slice n] − (Σ_{m ≥ n} e_m / ‖q_:d_m‖²) ∘ Q[:, slice n])

where slice n are the columns that prefix n adds to prefix n − 1; likewise for K. Each column of Q and K enters one
product in each direction. Sums of gradients have `prefixes` further columns with e_m, which move with them between
ranks. Their total is the gradient of logit_scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losses.checks import accumulator_dtype, all_finite
from losses.distributed.blocks import ColumnSums, GradientFactors, GradientWeights, PassageBlock, RowSums
from losses.distributed.torch_blocks import SCALE_ROWS, TorchBackend
from losses.inputs import ContrastiveBatch
from losses.option_checks.objective import SHORTEST_PREFIX, Prefixes
from losses.precision import GradientSums, Precision, add_product, round_operand
from losses.torch_tiles.inf_cl import to_score_gradient
from losses.torch_tiles.statistics import Statistics, add_tile, negative_log_probability
from losses.torch_tiles.tiles import ScoreTiles


class TorchMatryoshkaBackend(TorchBackend):
    """`BlockBackend` for prefixes of the embeddings; tables have a dimension of prefixes."""

    def __init__(
        self,
        batch: ContrastiveBatch,
        precision: Precision,
        workspace_bytes: int,
        first_passage: int,
        prefixes: Prefixes,
    ) -> None:
        # A tile is held once for each prefix, and as a sum, its scores and a temporary.
        super().__init__(batch, precision, 2 * workspace_bytes // (len(prefixes.dims) + 4), first_passage)
        self.prefixes = prefixes
        self.width = prefixes.dims[-1] + len(prefixes.dims)
        self._weights = prefixes.weight_column(batch.logit_scale)
        self._query_inverse = inverse_lengths(self.query, prefixes, precision)
        self._own_passage = self.query[:0]

    def score_bounds(self, own: PassageBlock, positives_local: bool) -> Tensor:
        self._own_passage = own.passage
        finite = all_finite(*(side for side in (self.query, own.passage) if len(side)), self._weights)
        # No cosine exceeds 1. The lowest score of a positive is not measured.
        return torch.stack(
            [torch.full_like(self._weights[0, 0], bound) for bound in (1, 1, torch.inf)] + [(~finite).to(self.dtype)]
        )

    def initial_sums(self, kinds: int, size: int) -> Tensor:
        prefixes = len(self.prefixes.dims)
        return super().initial_sums(kinds, prefixes * size).view(kinds, prefixes, size)

    def accumulate_sums(self, block: PassageBlock, rows: RowSums, columns: ColumnSums) -> None:
        for m, _, tile, tiles, span, column_span in self._prefix_scores(block):
            add_tile(tile, tiles, self._prefix_statistics(m, rows, columns.shift, columns.total), span, column_span)

    def loss_sum(self, rows: RowSums, columns: ColumnSums | None) -> Tensor:
        return torch.where(self._invalid, torch.nan, weighted_loss_sum(rows, columns, self._weights))

    def accumulate_gradients(
        self,
        block: PassageBlock,
        rows: RowSums,
        column_shift: Tensor,
        weights: GradientWeights,
        sums: GradientSums,
    ) -> None:
        sums = sums.cleared()
        inverse = inverse_lengths(block.passage, self.prefixes, self.precision)
        width, gradients = self.prefixes.dims[-1], list[Tensor]()
        for m, product, tile, tiles, span, column_span in self._prefix_scores(block):
            of_prefix = weights.row[m], None if weights.column is None else weights.column[m]
            statistics = self._prefix_statistics(m, rows, column_shift, column_shift)
            to_score_gradient(tile, tiles, statistics, of_prefix, span, column_span)
            tile.mul_(self._query_inverse[m, span, None] * self.prefixes.weights[m]).mul_(inverse[m, column_span])
            gradients = [*gradients, tile.clone()] if m else [tile.clone()]
            # Sums of dS cos.
            tile.mul_(product)
            if sums.query is not None:
                sums.query[span, width + m] += tile.sum(1)
            if sums.passage is not None:
                sums.passage[column_span, width + m] += tile.sum(0)
            if m + 1 == len(self.prefixes.dims):
                self._add_products(gradients, tiles, span, column_span, sums.block(span, column_span))

    def _add_products(
        self, gradients: list[Tensor], tiles: ScoreTiles, span: slice, column_span: slice, sums: GradientSums
    ) -> None:
        """Add the products of the tile's sums H_n, which overwrite the gradients G_m of the prefixes."""
        query, passage = tiles.query_block(span), tiles.passage_block(column_span)
        for n in reversed(range(len(gradients))):
            if n + 1 < len(gradients):
                gradients[n] += gradients[n + 1]
            columns, factor = self.prefixes.slices[n], tiles.products.factor(gradients[n])
            sums.columns(columns).add(factor, query[:, columns], passage[:, columns])

    def finish_gradient(
        self, sums: Tensor, factors: GradientFactors, dtype: torch.dtype | None, scale: bool, of_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        factor = factors.upstream.to(self.dtype) * factors.share
        width = self.prefixes.dims[-1]
        of_scale = sums[:, width:].sum() * factor if scale else None
        if dtype is None:
            return None, of_scale
        side = self.query if of_queries else self._own_passage
        inverse = self._query_inverse if of_queries else inverse_lengths(side, self.prefixes, self.precision)
        # Σ_{m ≥ n} e_m / ‖q_:d_m‖², [prefixes, rows].
        along = (sums[:, width:].T * inverse**2).flip(0).cumsum(0).flip(0)
        gradient = sums.new_zeros(len(side), side.shape[1], dtype=dtype)
        for start in range(0, len(side), SCALE_ROWS):
            chunk = slice(start, start + SCALE_ROWS)
            for n, columns in enumerate(self.prefixes.slices):
                own = round_operand(side[chunk, columns], self.precision) * along[n, chunk, None]
                gradient[chunk, columns] = (sums[chunk, columns] - own).mul_(factor * self.batch.logit_scale.detach())
        return gradient, of_scale

    def _prefix_scores(self, block: PassageBlock) -> Iterator[tuple[int, Tensor, Tensor, ScoreTiles, slice, slice]]:
        """(prefix, products, masked scores, tiles, rows, columns) of each tile and prefix, prefixes innermost.

        Products and scores are valid until the next item; the scores may be overwritten.
        """
        tiles, inverse = self._tiles(block), inverse_lengths(block.passage, self.prefixes, self.precision)
        scaled = self._query_inverse * self.batch.logit_scale.detach()
        buffer = torch.empty(tiles.tile_rows * tiles.tile_columns, dtype=self.dtype, device=tiles.device)
        for span in tiles.row_blocks():
            query = tiles.query_block(span)
            for column_span in tiles.column_blocks():
                passage = tiles.passage_block(column_span)
                products = buffer[: len(query) * len(passage)].view(len(query), len(passage))
                for m, columns in enumerate(self.prefixes.slices):
                    add_product(products, query[:, columns], passage[:, columns].T, first=not m)
                    tile = torch.mul(products, scaled[m, span, None], out=tiles.buffer(span, column_span))
                    tile.mul_(inverse[m, column_span])
                    yield m, products, tiles.mask(span, column_span), tiles, span, column_span

    def _prefix_statistics(self, m: int, rows: RowSums, column_shift: Tensor, column_total: Tensor) -> Statistics:
        shift, total = (column_shift[m], column_total[m]) if self.batch.symmetric else (None, None)
        return Statistics(rows.score[m], rows.shift[m], rows.total[m], shift, total, self._constant)


def inverse_lengths(side: Tensor, prefixes: Prefixes, precision: Precision) -> Tensor:
    """[prefixes, rows]: 1 / ‖row_:d‖ of embeddings in the operand precision, or 0 if the prefix is zero."""
    dtype = accumulator_dtype(side.dtype)
    found = torch.empty(len(prefixes.dims), len(side), dtype=dtype, device=side.device)
    # In chunks of rows, to bound the size of the squares.
    for start in range(0, len(side), SCALE_ROWS):
        chunk = slice(start, start + SCALE_ROWS)
        squares = torch.zeros_like(found[0, chunk])
        for m, columns in enumerate(prefixes.slices):
            squares += round_operand(side[chunk, columns], precision).square().sum(1)
            length = squares.sqrt()
            found[m, chunk] = torch.where(length >= SHORTEST_PREFIX, 1 / length, 0)
    return found


def weighted_loss_sum(rows: RowSums, columns: ColumnSums | None, weights: Tensor) -> Tensor:
    """0-dim float64: the sum of row losses, or half the sum of row and column losses, weighted by prefix.

    Shifts and scores are exponents of e; `weights` is [prefixes, 1].
    """
    loss = (weights * negative_log_probability(rows.score, rows.shift, rows.total)).sum(dtype=torch.float64)
    if columns is None:
        return loss
    shift, total, positive_count, scores = columns.table
    losses = negative_log_probability(scores / positive_count.clamp(min=1), shift, total)
    of_columns = torch.where(positive_count > 0, positive_count * losses, 0)
    return (loss + (weights * of_columns).sum(dtype=torch.float64)) / 2
