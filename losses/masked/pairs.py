"""The positive pairs of a batch, and their losses, weights and gradients from the sums over negatives.

Let N_i be the sum over the negatives of row i, N'_j that of column j, and E_i = Σ_{p ∈ P_i} exp S_ip. The losses of a
row and their derivatives, with σ(x) = 1 / (1 + exp(−x)):

    mean   mean_p log(1 + N_i / exp S_ip)    d/dS_ip = −σ(log N_i − S_ip) / |P_i|
    sum    log(1 + N_i / E_i)                d/dS_ip = −σ(log N_i − log E_i) · exp S_ip / E_i

A negative's derivative is its term of N_i times the weight of the row, mean_p 1 / (exp S_ip + N_i) or 1 / (E_i + N_i).
Nothing is subtracted from a sum, so nothing cancels. Columns are the same with the queries of a passage; if one
positive per query was given ("single"), the loss of column j for query i is log(E'_j + N'_j) − S_ij.

All this is on vectors of pairs, queries and passages of the pool, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from losses.distributed.communication import Communication
from losses.inputs import ContrastiveBatch
from losses.option_checks.masked import pair_keys


@dataclass(frozen=True)
class PositivePairs:
    """All positive pairs of this rank's queries, sorted by query and passage.

    Attributes:
        rows: [P] int64, rows of queries.
        columns: [P] int64, rows of the pool.
        counted: [P] float64, 1, and 0 for repeated pairs.
        own: [M] int64, position of the pair of each query and its `positive`.
    """

    rows: Tensor
    columns: Tensor
    counted: Tensor
    own: Tensor

    @classmethod
    def of(cls, batch: ContrastiveBatch, pool_size: int) -> PositivePairs:
        """The pairs of a batch whose `positive` and further pairs are rows of a pool."""
        queries = len(batch.query)
        rows = torch.arange(queries, device=batch.query.device)
        own = torch.stack([rows, batch.positive], 1)
        further = batch.options.pairs if batch.options is not None else None
        if further is None:
            return cls(rows, batch.positive, torch.ones_like(rows, dtype=torch.float64), rows)
        pairs = torch.cat([own, further])
        # Stable, so that of repeated pairs a query's own one comes first and counts.
        keys, order = pair_keys(pairs, pool_size).sort(stable=True)
        counted = torch.ones_like(keys, dtype=torch.float64)
        counted[1:] = (keys[1:] != keys[:-1]).double()
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        # Kernels read contiguous lists.
        rows, columns = pairs[order].T.contiguous()
        return cls(rows, columns, counted, position[:queries])


@dataclass(frozen=True)
class PairLosses:
    """The loss and what backward needs, for M · dS.

    Attributes:
        loss_sum: 0-dim, this rank's part of M times the loss.
        row_weight: [M], the factor of exp(x − shift) in row i.
        row_share: [M], M times the derivative of the loss by log N_i.
        column_weight: [N] for the pool, or None if the loss is not symmetric.
        pair_gradient: [P].
        largest: 0-dim, bound of the magnitude of M · dS.
    """

    loss_sum: Tensor
    row_weight: Tensor
    row_share: Tensor
    column_weight: Tensor | None
    pair_gradient: Tensor
    largest: Tensor


def pair_losses(
    pairs: PositivePairs,
    scores: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor] | None,
    reduction: str,
    queries: int,
    communication: Communication,
) -> PairLosses:
    """Losses from the scores [P] of the pairs and the sums over negatives.

    Args:
        rows: [M] each, the shifts of the rows and log N_i.
        columns: [N] each, the shifts of the columns of the pool and log N'_j; None if the loss is not symmetric.
        queries: Number of queries on all ranks.
    """
    row = _of_side(pairs.rows, pairs.counted, scores, *rows, "mean" if reduction == "single" else reduction)
    row_weight, row_sum = row.weight, row.loss_sum
    if columns is None:
        return PairLosses(row_sum, row_weight, row.share, None, row.gradient, row_sum.new_ones(()))
    column = _of_side(pairs.columns, pairs.counted, scores, *columns, reduction, communication)
    factor = torch.ones_like(row_sum)
    if reduction != "single":
        factor = queries / (column.count > 0).double().sum().clamp(min=1)
    return PairLosses(
        loss_sum=(row_sum + factor * column.loss_sum) / 2,
        row_weight=row_weight / 2,
        row_share=row.share / 2,
        column_weight=factor * column.weight / 2,
        pair_gradient=(row.gradient + factor * column.gradient) / 2,
        largest=torch.maximum(factor, column.count.max()) if reduction == "single" else factor.clamp(min=1),
    )


@dataclass(frozen=True)
class _Side:
    """Losses of the rows, or of the columns of the pool."""

    loss_sum: Tensor
    weight: Tensor
    share: Tensor
    gradient: Tensor
    count: Tensor


def _of_side(
    index: Tensor,
    counted: Tensor,
    scores: Tensor,
    shift: Tensor,
    negatives: Tensor,
    reduction: str,
    communication: Communication | None = None,
) -> _Side:
    """Losses of lines (rows or columns) whose positives are pairs `index` [P] with `scores` [P].

    Columns have positives on all ranks, which `communication` adds up.
    """
    size = len(negatives)

    def total(values: Tensor) -> Tensor:
        sums = segment_sum(values * counted, index, size)
        if communication is not None:
            communication.reduce_sum(sums)
        return sums

    count = total(torch.ones_like(scores))
    each = count.clamp(min=1)[index]
    of_pair = negatives[index]
    if reduction == "mean":
        margin = scores - of_pair
        weight = total((shift[index] - torch.logaddexp(scores, of_pair)).exp() / each)
        share = total(torch.sigmoid(-margin) / each)
        losses, gradient = -logsigmoid(margin) / each, -torch.sigmoid(-margin) / each
        return _Side((losses * counted).sum(), weight, share, gradient, count)
    positives = segment_logsumexp(scores, counted, index, size, communication)
    every = torch.logaddexp(positives, negatives)
    if reduction == "sum":
        margin = (positives - negatives)[index]
        losses = -logsigmoid(margin) / each
        gradient = -torch.sigmoid(-margin) * (scores - positives[index]).exp()
        multiplicity = (count > 0).to(scores.dtype)
    else:
        losses = every[index] - scores
        gradient = count[index] * (scores - every[index]).exp() - 1
        multiplicity = count
    weight = torch.where(count > 0, multiplicity * (shift - every).exp(), 0)
    share = torch.where(count > 0, multiplicity * torch.sigmoid(negatives - positives), 0)
    return _Side((losses * counted).sum(), weight, share, gradient, count)


def segment_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size]: the sum of the values [P] with each index, in a fixed order."""
    out = values.new_zeros(size)
    if values.is_cuda:
        # It sorts the indices, where index_add_ would add in any order.
        return out.index_put_((index,), values, accumulate=True)
    return out.index_add_(0, index, values)


def segment_logsumexp(
    scores: Tensor, counted: Tensor, index: Tensor, size: int, communication: Communication | None = None
) -> Tensor:
    """[size]: log Σ exp of the counted scores [P] with each index; minus infinity if there is none."""
    highest = scores.new_full((size,), -torch.inf).scatter_reduce_(0, index, scores, "amax")
    if communication is not None:
        communication.reduce_max(highest)
    base = torch.where(highest == -torch.inf, 0, highest)
    sums = segment_sum((scores - base[index]).exp() * counted, index, size)
    if communication is not None:
        communication.reduce_sum(sums)
    return base + sums.log()
