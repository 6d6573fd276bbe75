"""Reference implementations with the whole score matrix and plain autograd, which the tests compare against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses.inputs import ContrastiveBatch, all_finite
from losses.negatives.inputs import FurtherNegatives
from losses.precision import Precision, matmul_precision, round_operand


def full_matrix_loss(
    batch: ContrastiveBatch, precision: Precision, negatives: FurtherNegatives | None = None
) -> Tensor:
    """InfoNCE from the whole matrix S = logit_scale · Q Kᵀ [M, N], in float32 (float64 for float64 embeddings).

    "tf32" allows rounding and is not used here. "bf16" rounds Q and K with a straight-through gradient. Memory is
    several times M · N. Negatives outside the pool are further columns of the rows of S.
    """
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
        scores = batch.logit_scale * (query @ passage.T)
        own = (torch.arange(scores.shape[0], device=scores.device), batch.positive)
        if batch.query_ids is not None and batch.passage_ids is not None:
            masked = batch.query_ids[:, None] == batch.passage_ids
            masked[own] = False
            scores = scores.masked_fill(masked, -torch.inf)
        if batch.excluded is not None:
            scores = scores.masked_fill(excluded_mask(batch), -torch.inf)
        if negatives is None:
            loss = -scores.log_softmax(1)[own].mean()
        else:
            columns = further_columns(batch, query, passage, scores, negatives, precision)
            loss = (torch.cat([scores, *columns], 1).logsumexp(1) - scores[own]).mean()
        if batch.symmetric and not (negatives is not None and negatives.same_side):
            loss = (loss - scores.log_softmax(0)[own].mean()) / 2
        sides = [batch.query, batch.passage]
        if negatives is not None and negatives.own is not None and len(negatives.own.values):
            sides.append(negatives.own.values)
        return torch.where(all_finite(*sides), loss, torch.nan)


def further_columns(
    batch: ContrastiveBatch,
    query: Tensor,
    passage: Tensor,
    scores: Tensor,
    negatives: FurtherNegatives,
    precision: Precision,
) -> list[Tensor]:
    """Scores [M, ·] of the negatives outside the pool, minus infinity where a row does not have them."""
    rows = torch.arange(len(query), device=query.device)
    columns = []
    if negatives.own is not None:
        values, offsets = straight_through_round(negatives.own.values, precision), negatives.own.offsets
        number = torch.arange(len(values), device=query.device)
        mine = (number >= offsets[:-1, None]) & (number < offsets[1:, None])
        columns.append((batch.logit_scale * (query @ values.T)).masked_fill(~mine, -torch.inf))
    if negatives.frozen is not None:
        blocks = [block.clone() for _, block in negatives.frozen.blocks(query.device, max(1, negatives.frozen.rows))]
        frozen = torch.cat([batch.query.detach()[:0], *(block.to(batch.query.dtype) for block in blocks)])
        frozen = round_operand(frozen, precision)
        frozen_scores = torch.where(frozen.isfinite().all(), batch.logit_scale * (query @ frozen.T), torch.nan)
        if negatives.frozen_excluded is not None:
            removed = torch.zeros_like(frozen_scores, dtype=torch.bool)
            removed[negatives.frozen_excluded.unbind(1)] = True
            frozen_scores = frozen_scores.masked_fill(removed, -torch.inf)
        columns.append(frozen_scores)
    if negatives.same_side:
        same = rows[:, None] == rows if batch.query_ids is None else batch.query_ids[:, None] == batch.query_ids
        columns.append((batch.logit_scale * (query @ query.T)).masked_fill(same, -torch.inf))
    if negatives.same_side and batch.symmetric:
        columns.append(scores[:, batch.positive].T)
        ids = torch.arange(len(passage), device=query.device) if batch.passage_ids is None else batch.passage_ids
        same = ids[batch.positive][:, None] == ids
        columns.append((batch.logit_scale * (passage[batch.positive] @ passage.T)).masked_fill(same, -torch.inf))
    return columns


def full_matrix_sigmoid_loss(batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision) -> Tensor:
    """Sigmoid loss from the whole matrix of pairs, in float32 (float64 for float64 embeddings).

    "tf32" allows rounding and is not used here. "bf16" rounds Q and K with a straight-through gradient. Memory is
    several times M · N.
    """
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
        scores = batch.logit_scale * (query @ passage.T) + logit_bias
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[torch.arange(len(own), device=own.device), batch.positive] = True
        losses = -nn.functional.logsigmoid(torch.where(own, scores, -scores))
        if batch.query_ids is not None and batch.passage_ids is not None:
            masked = (batch.query_ids[:, None] == batch.passage_ids) & ~own
            losses = losses.masked_fill(masked, 0)
        if batch.excluded is not None:
            losses = losses.masked_fill(excluded_mask(batch), 0)
        return torch.where(all_finite(batch.query, batch.passage), losses.sum() / len(losses), torch.nan)


def excluded_mask(batch: ContrastiveBatch) -> Tensor:
    """[M, N] bool, True at the pairs of `excluded`."""
    entries = torch.zeros(len(batch.query), len(batch.passage), dtype=torch.bool, device=batch.query.device)
    if batch.excluded is not None:
        entries[batch.excluded.unbind(1)] = True
    return entries


def straight_through_round(side: Tensor, precision: Precision) -> Tensor:
    """Round embeddings to the operand precision; the gradient is passed through unchanged."""
    wide = side.to(round_operand(side[:1], precision).dtype)
    return wide + (round_operand(side.detach(), precision) - wide.detach())
