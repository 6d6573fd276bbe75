"""InfoNCE in tiles, in PyTorch, on any device: memory linear in the batch size, four matrix products in total.

Forward computes each tile of S = logit_scale · Q Kᵀ once and accumulates the softmax statistics of its rows and
columns. Backward recomputes the tile, turns it into dS in place, and adds dS K to dQ and dSᵀ Q to dK. docs/design/
losses.md has the derivation and the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.checks import all_finite
from losses.inputs import ContrastiveBatch
from losses.precision import Precision, add_product, matmul_precision
from losses.torch_tiles.row_terms import Shares, column_counts
from losses.torch_tiles.tiles import ScoreTiles

# Largest exponent after subtracting a constant shift. Sums of 2^40 terms exp(60) are finite in float32, and a term
# that underflows is less than exp(-27) of a sum of at least exp(-60).
MAX_EXPONENT = 60.0


def tiled_loss(batch: ContrastiveBatch, precision: Precision, workspace_bytes: int) -> Tensor:
    """0-dim InfoNCE loss of the batch, differentiable once with respect to query, passage and logit_scale.

    In addition to inputs, gradients and vectors of M and N numbers, it uses at most `workspace_bytes` (at least one
    tile), and a float32 accumulator of the passage gradient if the embeddings are in half precision.
    """
    return _TiledLoss.apply(
        batch.query,
        batch.passage,
        batch.logit_scale,
        batch.further,
        batch.positive,
        batch.query_ids,
        batch.passage_ids,
        batch.excluded,
        batch.symmetric,
        batch.single_partition,
        precision,
        workspace_bytes,
    )


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        passage: Tensor,
        logit_scale: Tensor,
        further: Tensor | None,
        positive: Tensor,
        query_ids: Tensor | None,
        passage_ids: Tensor | None,
        excluded: Tensor | None,
        symmetric: bool,
        single_partition: bool,
        precision: Precision,
        workspace_bytes: int,
    ) -> Tensor:
        masks = (query_ids, passage_ids, symmetric, False, excluded)
        batch = ContrastiveBatch(query, passage, logit_scale, positive, *masks)
        with matmul_precision(precision, query.device):
            statistics = score_statistics(ScoreTiles(batch, precision, workspace_bytes))
            # A score of minus infinity adds zero to every sum, so the inputs themselves are checked.
            shares = None if further is None else shares_of(statistics, positive, further, single_partition)
            loss = torch.where(all_finite(query, passage), loss_value(statistics, positive, shares), torch.nan)
        ctx.save_for_backward(query, passage, logit_scale, positive, query_ids, passage_ids, excluded)
        ctx.symmetric, ctx.precision, ctx.workspace_bytes = symmetric, precision, workspace_bytes
        ctx.statistics, ctx.shares = statistics, shares
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled loss is differentiable once: implementation='full' has second derivatives")
        query, passage, logit_scale, positive, query_ids, passage_ids, excluded = ctx.saved_tensors
        masks = (query_ids, passage_ids, ctx.symmetric, False, excluded)
        batch = ContrastiveBatch(query, passage, logit_scale, positive, *masks)
        with matmul_precision(ctx.precision, query.device):
            tiles = ScoreTiles(batch, ctx.precision, ctx.workspace_bytes)
            of_query, of_passage, of_scale = ctx.needs_input_grad[:3]
            gradients = score_gradients(tiles, ctx.statistics, upstream, of_query, of_passage, of_scale, ctx.shares)
        of_further = None
        if ctx.shares is not None:
            of_further = ctx.shares.further_gradient(ctx.symmetric) * (upstream / len(positive))
        return *gradients, of_further, None, None, None, None, None, None, None, None


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
    highest, place = tile.max(1)
    place += masks.first + columns.start
    # Blocks of the pool come in any order; of equal scores the first row of the pool counts.
    best, hardest = counted.hardest_exponent[rows], counted.hardest[rows]
    better = (highest > best) | ((highest == best) & (place < hardest))
    counted.hardest[rows] = torch.where(better, place, hardest)
    counted.hardest_exponent[rows] = torch.where(better, highest, best)
    before = statistics.row_shift[rows]
    shift = torch.maximum(before, highest) if statistics.constant is None else before
    exponents = (tile - shift[:, None]).clamp_(min=torch.finfo(tile.dtype).min)
    change = before - shift
    kept = counted.weighted[rows] + change * statistics.row_sum[rows]
    # Without an exponent so far, the change is minus infinity and the sum zero.
    kept = torch.where(statistics.row_sum[rows] > 0, change.exp() * kept, 0)
    counted.weighted[rows] = kept + (exponents.exp() * exponents).sum(1)


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


def shares_of(statistics: Statistics, positive: Tensor, further: Tensor, single_partition: bool) -> Shares:
    """Shares of each row's denominator, with the log-sum-exps `further` [k, M] of negatives outside the pool."""
    column = None
    if single_partition:
        assert statistics.column_shift is not None and statistics.column_sum is not None
        column = (statistics.column_shift + statistics.column_sum.log())[positive]
    return Shares.of(statistics.row_shift + statistics.row_sum.log(), column, further)


def loss_value(statistics: Statistics, positive: Tensor, shares: Shares | None = None) -> Tensor:
    """Mean negative log-probability of the positives: over rows, or over rows and the positives' columns."""
    score = statistics.positive_score
    loss = negative_log_probability(score, statistics.row_shift, statistics.row_sum).mean()
    if shares is not None:
        loss = loss - shares.log_row.mean()
    if statistics.column_shift is None or statistics.column_sum is None or (shares and shares.column is not None):
        return loss
    columns = negative_log_probability(score, statistics.column_shift[positive], statistics.column_sum[positive])
    return (loss + columns.mean()) / 2


def score_gradients(
    tiles: ScoreTiles,
    statistics: Statistics,
    upstream: Tensor,
    query: bool,
    passage: bool,
    logit_scale: bool,
    shares: Shares | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, passage and logit_scale from the recomputed tiles; None for those not asked for.

    The tiles hold M · dS. The sums are multiplied by 1/M, logit_scale and the upstream gradient at the end.
    """
    batch, width = tiles.batch, tiles.batch.query.shape[1]
    queries, passages = batch.query.shape[0], batch.passage.shape[0]
    mean_factor = upstream.to(tiles.dtype) / queries
    score_factor = mean_factor * batch.logit_scale
    weights = softmax_weights(statistics, batch.positive, shares)
    query_gradient = torch.empty_like(batch.query) if query else None
    query_sum = torch.empty(tiles.tile_rows, width, dtype=tiles.dtype, device=tiles.device)
    passage_sum = torch.zeros(passages, width, dtype=tiles.dtype, device=tiles.device) if passage else None
    scale_sum = torch.zeros((), dtype=tiles.dtype, device=tiles.device)
    for rows in tiles.row_blocks():
        query_block = tiles.query_block(rows)
        block_sum = query_sum[: rows.stop - rows.start].zero_()
        wanted_sum = block_sum if query or logit_scale else None
        add_row_gradients(tiles, statistics, weights, rows, query_block, wanted_sum, passage_sum)
        if logit_scale:
            # Σ dS ∘ (Q Kᵀ) = Σ Q ∘ (dS K), which costs M·D instead of M·N.
            scale_sum += (block_sum * query_block).sum()
        if query_gradient is not None:
            query_gradient[rows] = block_sum.mul_(score_factor)
    passage_gradient = passage_sum.mul_(score_factor).to(batch.passage.dtype) if passage_sum is not None else None
    return query_gradient, passage_gradient, scale_sum * mean_factor if logit_scale else None


def add_row_gradients(
    tiles: ScoreTiles,
    statistics: Statistics,
    weights: tuple[Tensor, Tensor | None],
    rows: slice,
    query_block: Tensor,
    query_sum: Tensor | None,
    passage_sum: Tensor | None,
) -> None:
    """Add M · dS K of these rows to query_sum [rows, D] and M · dSᵀ Q to passage_sum [N, D]; None skips a sum."""
    for columns in tiles.column_blocks():
        passage_block = tiles.passage_block(columns)
        tile = tiles.scores(rows, columns, query_block, passage_block)
        to_score_gradient(tile, tiles, statistics, weights, rows, columns)
        factor = tiles.products.factor(tile)
        if query_sum is not None:
            add_product(query_sum, factor, passage_block)
        if passage_sum is not None:
            add_product(passage_sum[columns], factor.T, query_block)


def to_score_gradient(
    tile: Tensor,
    tiles: ScoreTiles,
    statistics: Statistics,
    weights: tuple[Tensor, Tensor | None],
    rows: slice,
    columns: slice,
) -> None:
    """Turn the tile S[rows, columns] into M · dS in place: weighted softmaxes, minus one at the positives."""
    row_weight, column_weight = weights
    if column_weight is None or statistics.column_shift is None:
        tile.sub_(statistics.row_shift[rows, None]).exp_().mul_(row_weight[rows, None])
    elif statistics.constant is not None:
        scratch = tiles.scratch(rows, columns)
        torch.add(row_weight[rows, None], column_weight[columns], out=scratch)
        tile.sub_(statistics.constant).exp_().mul_(scratch)
    else:
        scratch = tiles.scratch(rows, columns)
        torch.sub(tile, statistics.column_shift[columns], out=scratch).exp_().mul_(column_weight[columns])
        tile.sub_(statistics.row_shift[rows, None]).exp_().mul_(row_weight[rows, None]).add_(scratch)
    if tiles.masks is not None:
        tiles.write_pair_gradients(rows, columns)
        return
    column, inside = tiles.positive_columns(rows, columns)
    tile.scatter_(1, column, tile.gather(1, column) - inside.to(tile.dtype))


def softmax_weights(
    statistics: Statistics, positive: Tensor, shares: Shares | None = None
) -> tuple[Tensor, Tensor | None]:
    """Factors of exp(S − shift) in M · dS, for rows [M] and, for a symmetric loss, columns [N].

    A factor is the weight of a row or column in the loss divided by its sum. A column counts once for each query whose
    positive it is, so it is zero for hard negatives.
    """
    symmetric = statistics.column_sum is not None
    share = 1 if shares is None else shares.row_factor(symmetric)
    if statistics.column_sum is None:
        return share / statistics.row_sum, None
    if shares is not None and shares.column is not None:
        positive_count = column_counts(positive, shares.column, len(statistics.column_sum))
    else:
        positive_count = torch.zeros_like(statistics.column_sum).index_add_(
            0, positive, torch.ones_like(statistics.row_sum)
        )
    column_weight = torch.where(positive_count > 0, positive_count / (2 * statistics.column_sum), 0)
    return share / (2 * statistics.row_sum), column_weight


def update_softmax(shift: Tensor, total: Tensor, tile: Tensor, dim: int, out: Tensor) -> None:
    """Online softmax: add a tile to running maxima and sums of exponentials, in place; `out` may be the tile itself."""
    new_shift = torch.maximum(shift, tile.amax(dim))
    torch.sub(tile, new_shift.unsqueeze(dim), out=out).exp_()
    total.mul_((shift - new_shift).exp_()).add_(out.sum(dim))
    shift.copy_(new_shift)


def negative_log_probability(score: Tensor, shift: Tensor, total: Tensor) -> Tensor:
    """−log(exp(score) / (exp(shift) · total)), accurate for probabilities near one and never negative."""
    margin = score - shift
    ratio = total / margin.exp()
    return torch.where(ratio < 1e30, ratio.log(), total.log() - margin)
