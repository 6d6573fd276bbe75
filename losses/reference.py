"""Reference implementations with the whole score matrix and plain autograd, which the tests compare against."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from losses.inputs import ContrastiveBatch, all_finite
from losses.objective import Objective, Prefixes
from losses.options import Teacher, TeacherScores
from losses.precision import Precision, matmul_precision, round_operand

# Prefixes that are shorter count as zero.
SHORTEST_PREFIX = 1e-12


def full_matrix_objective(batch: ContrastiveBatch, objective: Objective, precision: Precision) -> Tensor:
    """`full_matrix_loss` with the options of `objective`, by their definitions."""
    if objective.prefixes is not None:
        return _matryoshka_loss(batch, objective.prefixes, precision)
    loss = full_matrix_loss(batch, precision)
    if isinstance(objective.teacher, Teacher):
        return loss + objective.teacher.weight * _teacher_divergence(batch, objective.teacher, precision)
    if objective.teacher is not None:
        return loss + objective.teacher.weight * _teacher_scores_term(batch, objective.teacher, precision)
    return loss


def _matryoshka_loss(batch: ContrastiveBatch, prefixes: Prefixes, precision: Precision) -> Tensor:
    query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
    loss = query.new_zeros(())
    for size, weight in zip(prefixes.dims, prefixes.weights, strict=True):
        nested = replace(batch, query=_normalized(query[:, :size]), passage=_normalized(passage[:, :size]))
        loss = loss + weight * full_matrix_loss(nested, "fp32")
    return torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)


def _normalized(prefix: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(prefix, dim=1, keepdim=True)
    return torch.where(length >= SHORTEST_PREFIX, prefix / length.clamp(min=SHORTEST_PREFIX), 0)


def _teacher_divergence(batch: ContrastiveBatch, teacher: Teacher, precision: Precision) -> Tensor:
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (teacher.query, teacher.passage))
        scores = _masked_scores(batch, precision)
        removed = scores == -torch.inf
        theirs = (teacher.scale * (query @ passage.T)).masked_fill(removed, -torch.inf).log_softmax(1)
        differences = (theirs - scores.log_softmax(1)).masked_fill(removed, 0)
        return (theirs.exp() * differences).sum(1).mean()


def _teacher_scores_term(batch: ContrastiveBatch, teacher: TeacherScores, precision: Precision) -> Tensor:
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
        scores = batch.logit_scale * (query @ passage.T)
        total = scores.new_zeros(())
        for row, (start, stop) in enumerate(zip(teacher.offsets[:-1], teacher.offsets[1:], strict=True)):
            if stop - start < 2:
                continue
            ours, theirs = scores[row, teacher.passages[start:stop]], teacher.scale * teacher.scores[start:stop]
            if teacher.kind == "kl":
                theirs = theirs.log_softmax(0)
                total = total + (theirs.exp() * (theirs - ours.log_softmax(0))).sum()
            else:
                margins = (ours[0] - ours[1:]) - (theirs[0] - theirs[1:])
                total = total + (margins**2).mean()
        return total / len(query)


def full_matrix_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """InfoNCE from the whole matrix S = logit_scale · Q Kᵀ [M, N], in float32 (float64 for float64 embeddings).

    "tf32" allows rounding and is not used here. "bf16" rounds Q and K with a straight-through gradient. Memory is
    several times M · N.
    """
    with matmul_precision("fp32", batch.query.device):
        scores = _masked_scores(batch, precision)
        own = (torch.arange(scores.shape[0], device=scores.device), batch.positive)
        loss = -scores.log_softmax(1)[own].mean()
        if batch.symmetric:
            loss = (loss - scores.log_softmax(0)[own].mean()) / 2
        return torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)


def _masked_scores(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """S [M, N], minus infinity where masked."""
    query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
    scores = batch.logit_scale * (query @ passage.T)
    own = (torch.arange(scores.shape[0], device=scores.device), batch.positive)
    if batch.query_ids is not None and batch.passage_ids is not None:
        masked = batch.query_ids[:, None] == batch.passage_ids
        masked[own] = False
        scores = scores.masked_fill(masked, -torch.inf)
    if batch.excluded is not None:
        scores = scores.masked_fill(excluded_mask(batch), -torch.inf)
    return scores


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
