"""Softmax statistics of the tiles of S: sums of exponentials over rows and columns, with shifts against overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.torch_tiles.tiles import ScoreTiles

# Largest exponent after subtracting a constant shift. Sums of 2^40 terms exp(60) are finite in float32, and a term
# that underflows is less than exp(-27) of a sum of at least exp(-60).
MAX_EXPONENT = 60.0


@dataclass(frozen=True)
class Statistics:
    """Softmax denominators of S: Σ_j exp(S_ij) = exp(row_shift_i) · row_sum_i, and the same over i for columns.

    Attributes:
        positive_score: [M], the scores S_i,p(i).
        row_shift, row_sum: [M].
        column_shift, column_sum: [N], or None if the loss is not symmetric.
        constant: 0-dim, one shift for all rows and columns if one is safe, otherwise None. Then one exponential per
            score serves both directions.
    """

    positive_score: Tensor
    row_shift: Tensor
    row_sum: Tensor
    column_shift: Tensor | None
    column_sum: Tensor | None
    constant: Tensor | None


def score_statistics(tiles: ScoreTiles) -> Statistics:
    """Compute each tile of S once, and from it the row sums and, for a symmetric loss, the column sums."""
    batch = tiles.batch
    constant = None
    if batch.symmetric and tiles.device.type == "cpu":
        constant = constant_shift(score_bounds(tiles), batch.logit_scale)

    def vector(size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=tiles.dtype, device=tiles.device)

    def shift(size: int) -> Tensor:
        return vector(size, torch.finfo(tiles.dtype).min) if constant is None else constant.expand(size)

    queries, passages = batch.query.shape[0], batch.passage.shape[0]
    positive_score, row_shift, row_sum = vector(queries, 0), shift(queries), vector(queries, 0)
    column_shift, column_sum = (shift(passages), vector(passages, 0)) if batch.symmetric else (None, None)
    statistics = Statistics(positive_score, row_shift, row_sum, column_shift, column_sum, constant)
    add_statistics(tiles, statistics)
    return statistics


def add_statistics(tiles: ScoreTiles, statistics: Statistics) -> None:
    """Add all tiles to the statistics, in place. The tiles are those of a batch, or of one block of its passages."""
    for rows in tiles.row_blocks():
        query = tiles.query_block(rows)
        for columns in tiles.column_blocks():
            tile = tiles.scores(rows, columns, query, tiles.passage_block(columns))
            add_tile(tile, tiles, statistics, rows, columns)


def add_tile(tile: Tensor, tiles: ScoreTiles, statistics: Statistics, rows: slice, columns: slice) -> None:
    """Add the tile S[rows, columns] to the statistics, in place; the tile is overwritten."""
    row_shift, row_sum = statistics.row_shift, statistics.row_sum
    column_shift, column_sum = statistics.column_shift, statistics.column_sum
    positive_score, constant = statistics.positive_score, statistics.constant
    if tiles.masks is None:
        column, inside = tiles.positive_columns(rows, columns)
        positive_score[rows] = torch.where(inside, tile.gather(1, column), positive_score[rows, None])[:, 0]
    else:
        add_row_statistics(tiles, tile, rows, columns, statistics)
    if constant is not None and column_sum is not None:
        tile.sub_(constant).exp_()
        row_sum[rows] += tile.sum(1)
        column_sum[columns] += tile.sum(0)
        return
    update_softmax(row_shift[rows], row_sum[rows], tile, 1, out=tiles.scratch(rows, columns))
    if column_shift is not None and column_sum is not None:
        update_softmax(column_shift[columns], column_sum[columns], tile, 0, out=tile)


def add_row_statistics(tiles: ScoreTiles, tile: Tensor, rows: slice, columns: slice, statistics: Statistics) -> None:
    """Add a tile of negatives to the row statistics of its masks, if wanted; before it is added to the row sums."""
    masks = tiles.masks
    counted = masks.masks.statistics if masks is not None else None
    if masks is None or counted is None:
        return
    own = masks.masks.product[rows, None] * tiles.batch.logit_scale
    counted.higher[rows] += (tile > own).sum(1)
    counted.counted[rows] += (tile > -torch.inf).sum(1)
    highest, column = tile.max(1)
    column += masks.first + columns.start
    # Blocks of the pool come in any order; of equal scores the first row of the pool counts.
    best, hardest = counted.hardest_exponent[rows], counted.hardest[rows]
    better = (highest > best) | ((highest == best) & (column < hardest))
    counted.hardest[rows] = torch.where(better, column, hardest)
    counted.hardest_exponent[rows] = torch.where(better, highest, best)
    before = statistics.row_shift[rows]
    shift = torch.maximum(before, highest) if statistics.constant is None else before
    exponents = (tile - shift[:, None]).clamp_(min=torch.finfo(tile.dtype).min)
    change = before - shift
    kept = counted.weighted[rows] + change * statistics.row_sum[rows]
    # Without an exponent so far, the change is minus infinity and the sum zero.
    kept = torch.where(statistics.row_sum[rows] > 0, change.exp() * kept, 0)
    counted.weighted[rows] = kept + (exponents.exp() * exponents).sum(1)


def update_softmax(shift: Tensor, total: Tensor, tile: Tensor, dim: int, out: Tensor) -> None:
    """Online softmax: add a tile to running maxima and sums of exponentials, in place; `out` may be the tile itself."""
    new_shift = torch.maximum(shift, tile.amax(dim))
    torch.sub(tile, new_shift.unsqueeze(dim), out=out).exp_()
    total.mul_((shift - new_shift).exp_()).add_(out.sum(dim))
    shift.copy_(new_shift)


def score_bounds(tiles: ScoreTiles, *, positives_local: bool = True) -> Tensor:
    """Bounds of the scores, [4].

    The bounds are max ‖q‖, max ‖k‖, minus the lowest positive score, and 1 if a value is not finite, otherwise 0.
    Bounds of several batches are combined by an elementwise maximum: a side without rows gives minus infinity. If the
    positives are not among the passages of `tiles` (`positives_local` is False), the third bound is infinity.
    """
    batch = tiles.batch
    unknown = torch.full((), -torch.inf, dtype=tiles.dtype, device=tiles.device)
    lengths, lowest = ([unknown], [unknown]), [unknown if positives_local else -unknown]
    for rows in tiles.row_blocks():
        query = tiles.query_block(rows)
        lengths[0].append(query.norm(dim=1).max().to(tiles.dtype))
        if positives_local:
            own = tiles.products.operand(batch.passage[batch.positive[rows]])
            lowest.append(-(query * own).sum(1).mul_(batch.logit_scale).min().to(tiles.dtype))
    for columns in tiles.column_blocks():
        lengths[1].append(tiles.passage_block(columns).norm(dim=1).max().to(tiles.dtype))
    finite = all_finite(*(side for side in (batch.query, batch.passage) if side.numel()), unknown.new_zeros(1))
    highest = [torch.stack(values).max() for values in (*lengths, lowest)]
    return torch.stack([*highest, (~finite).to(tiles.dtype)])


def constant_shift(bounds: Tensor, logit_scale: Tensor) -> Tensor | None:
    """One shift c that is safe for exp(S − c) in all rows and columns, or None if there is none.

    No score exceeds max‖q‖ · max‖k‖ · |logit_scale|, and no denominator that the loss uses is below exp of its
    positive score. If the two bounds are close enough, exp(S − c) does not overflow, and no sum that matters
    underflows. On a GPU this synchronizes with the device.
    """
    bound = bounds[0] * bounds[1] * logit_scale.abs()
    if bound + torch.minimum(bounds[2], bound) <= 2 * MAX_EXPONENT:
        return (bound - MAX_EXPONENT).clamp(min=0)
    return None


def negative_log_probability(score: Tensor, shift: Tensor, total: Tensor) -> Tensor:
    """−log(exp(score) / (exp(shift) · total)), accurate for probabilities near one and never negative."""
    margin = score - shift
    ratio = total / margin.exp()
    return torch.where(ratio < 1e30, ratio.log(), total.log() - margin)
