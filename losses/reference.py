"""The losses over the whole score matrix with plain autograd: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses.inputs import ContrastiveBatch, all_finite
from losses.precision import Precision, plain_arithmetic, rounded


def full_matrix_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """S = logit_scale · Q Kᵀ [M, N] in float32 (float64 for float64 embeddings), masked, then two log-softmaxes.

    "tf32" is permission to round and is not used here; "bf16" rounds Q and K, and their gradient passes the rounding
    unrounded. Memory is several times M·N.
    """
    with plain_arithmetic("fp32", batch.query.device):
        query, passage = (through_rounding(side, precision) for side in (batch.query, batch.passage))
        scores = batch.logit_scale * (query @ passage.T)
        own = (torch.arange(scores.shape[0], device=scores.device), batch.positive)
        if batch.query_ids is not None and batch.passage_ids is not None:
            masked = batch.query_ids[:, None] == batch.passage_ids
            masked[own] = False
            scores = scores.masked_fill(masked, -torch.inf)
        if batch.excluded is not None:
            scores = scores.masked_fill(excluded_entries(batch), -torch.inf)
        loss = -scores.log_softmax(1)[own].mean()
        if batch.symmetric:
            loss = (loss - scores.log_softmax(0)[own].mean()) / 2
        return torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)


def full_matrix_sigmoid_loss(batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision) -> Tensor:
    """The definition, over the whole matrix of pairs in float32 (float64 for float64 embeddings), by plain autograd.

    "tf32" is permission to round and is not used here; "bf16" rounds Q and K, and their gradient passes the rounding
    unrounded. Memory is several times M·N.
    """
    with plain_arithmetic("fp32", batch.query.device):
        query, passage = (through_rounding(side, precision) for side in (batch.query, batch.passage))
        scores = batch.logit_scale * (query @ passage.T) + logit_bias
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[torch.arange(len(own), device=own.device), batch.positive] = True
        losses = -nn.functional.logsigmoid(torch.where(own, scores, -scores))
        if batch.query_ids is not None and batch.passage_ids is not None:
            masked = (batch.query_ids[:, None] == batch.passage_ids) & ~own
            losses = losses.masked_fill(masked, 0)
        if batch.excluded is not None:
            losses = losses.masked_fill(excluded_entries(batch), 0)
        return torch.where(all_finite(batch.query, batch.passage), losses.sum() / len(losses), torch.nan)


def excluded_entries(batch: ContrastiveBatch) -> Tensor:
    """[M, N] bool: the pairs of `excluded`."""
    entries = torch.zeros(len(batch.query), len(batch.passage), dtype=torch.bool, device=batch.query.device)
    if batch.excluded is not None:
        entries[batch.excluded.unbind(1)] = True
    return entries


def through_rounding(side: Tensor, precision: Precision) -> Tensor:
    """What a product with `precision` reads of a side; its gradient passes unrounded."""
    wide = side.to(rounded(side[:1], precision).dtype)
    return wide + (rounded(side.detach(), precision) - wide.detach())
