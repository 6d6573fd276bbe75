"""Reference implementations with the whole score matrix and plain autograd, which the tests compare against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses.inputs import ContrastiveBatch, all_finite
from losses.precision import Precision, matmul_precision, round_operand


def full_matrix_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """InfoNCE from the whole matrix S = logit_scale · Q Kᵀ [M, N], in float32 (float64 for float64 embeddings).

    "tf32" allows rounding and is not used here. "bf16" rounds Q and K with a straight-through gradient. Memory is
    several times M · N.
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
        loss = -scores.log_softmax(1)[own].mean()
        if batch.symmetric:
            loss = (loss - scores.log_softmax(0)[own].mean()) / 2
        return torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)


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
