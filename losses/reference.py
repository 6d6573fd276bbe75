"""Reference implementations with the whole score matrix and plain autograd, which the tests compare against."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from losses.checks import all_finite
from losses.inputs import CheckedOptions, ContrastiveBatch
from losses.negatives.inputs import FurtherNegatives
from losses.option_checks.objective import Objective, Prefixes, normalized
from losses.options import NegativeLimit, Statistics, Teacher, TeacherScores
from losses.precision import Precision, matmul_precision, round_operand


def full_matrix_objective(batch: ContrastiveBatch, objective: Objective, precision: Precision) -> Tensor:
    """`full_matrix_loss` with the options of `objective`, by their definitions."""
    if objective.prefixes is not None:
        return _matryoshka_loss(batch, objective.prefixes, precision)
    loss = full_matrix_loss(batch, precision)
    if isinstance(objective.teacher, Teacher):
        return loss + objective.teacher.weight * _teacher_divergence(batch, objective.teacher, precision)
    if objective.teacher is not None:
        return loss + objective.teacher.weight * teacher_scores_term(batch, objective.teacher, precision)
    return loss


def _matryoshka_loss(batch: ContrastiveBatch, prefixes: Prefixes, precision: Precision) -> Tensor:
    query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
    loss = query.new_zeros(())
    for size, weight in zip(prefixes.dims, prefixes.weights, strict=True):
        nested = replace(batch, query=normalized(query[:, :size]), passage=normalized(passage[:, :size]))
        loss = loss + weight * full_matrix_loss(nested, "fp32")
    return torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)


def _teacher_divergence(batch: ContrastiveBatch, teacher: Teacher, precision: Precision) -> Tensor:
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (teacher.query, teacher.passage))
        scores = _masked_scores(batch, precision)
        removed = scores == -torch.inf
        theirs = (teacher.scale * (query @ passage.T)).masked_fill(removed, -torch.inf).log_softmax(1)
        differences = (theirs - scores.log_softmax(1)).masked_fill(removed, 0)
        return (theirs.exp() * differences).sum(1).mean()


def teacher_scores_term(batch: ContrastiveBatch, teacher: TeacherScores, precision: Precision) -> Tensor:
    """0-dim: the term of given scores of lists by its definition, without its weight."""
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


def full_matrix_loss(
    batch: ContrastiveBatch, precision: Precision, negatives: FurtherNegatives | None = None
) -> Tensor:
    """InfoNCE from the whole matrix S = logit_scale · Q Kᵀ [M, N], in float32 (float64 for float64 embeddings).

    "tf32" allows rounding and is not used here. "bf16" rounds Q and K with a straight-through gradient. Memory is
    several times M · N. Negatives outside the pool are further columns of the rows of S.
    """
    with matmul_precision("fp32", batch.query.device):
        scores = _masked_scores(batch, precision)
        own = (torch.arange(scores.shape[0], device=scores.device), batch.positive)
        if negatives is None:
            loss = -scores.log_softmax(1)[own].mean()
        else:
            query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
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


def full_matrix_negatives_loss(
    batch: ContrastiveBatch, precision: Precision, negatives: FurtherNegatives | None = None
) -> tuple[Tensor, Statistics]:
    """InfoNCE with the batch's `options`, and its statistics, from the whole matrix, as `full_matrix_loss` computes it.

    Every entry of S is a positive, removed, or a negative. Let N_i be the sum of exp S_ij, weighted by `hardness`, over
    the negatives of row i. A positive's row loss is log(1 + N_i / exp S_ip), or that of the sum of its row's positives.
    """
    options = batch.options
    assert options is not None
    with matmul_precision("fp32", batch.query.device):
        query, passage = (straight_through_round(side, precision) for side in (batch.query, batch.passage))
        products = query @ passage.T
        own = (torch.arange(len(query), device=query.device), batch.positive)
        positive = torch.zeros_like(products, dtype=torch.bool)
        positive[own] = True
        removed = excluded_mask(batch) | likely_false_negatives(options, products.detach(), own, precision)
        if batch.query_ids is not None and batch.passage_ids is not None:
            removed |= batch.query_ids[:, None] == batch.passage_ids
        if options.pairs is not None:
            positive[options.pairs.unbind(1)] = True
        removed &= ~positive
        negative = ~(positive | removed)
        scores = batch.logit_scale * products
        weighted = scores + options.hardness * products.detach()
        row = (scores, weighted, positive, negative)
        if negatives is not None:
            outside = torch.cat(further_columns(batch, query, passage, scores, negatives, precision), 1)
            there = outside > -torch.inf
            unscaled = replace(batch, logit_scale=torch.ones_like(batch.logit_scale))
            of_outside = torch.cat(further_columns(unscaled, query, passage, products, negatives, precision), 1)
            weights = options.hardness * of_outside.detach() if options.hardness else 0
            row = (
                torch.cat([scores, outside], 1),
                torch.cat([weighted, outside + weights], 1),
                torch.cat([positive, torch.zeros_like(there)], 1),
                torch.cat([negative, there], 1),
            )
        loss = _losses(*row, options.reduction, 1).mean()
        if batch.symmetric:
            if options.reduction == "single":
                columns = torch.where(positive, scores, weighted).masked_fill(removed, -torch.inf)
                column_loss = (columns.logsumexp(0)[batch.positive] - scores[own]).mean()
            else:
                columns = _losses(scores, weighted, positive, negative, options.reduction, 0)
                column_loss = columns.sum() / positive.any(0).sum()
            loss = (loss + column_loss) / 2
        loss = torch.where(all_finite(batch.query, batch.passage), loss, torch.nan)
    with torch.no_grad():
        entries = torch.where(positive, scores, weighted).masked_fill(removed, -torch.inf)
        return loss, full_matrix_statistics(scores, entries, negative, removed, batch.positive)


def likely_false_negatives(
    options: CheckedOptions, products: Tensor, own: tuple[Tensor, Tensor], precision: Precision
) -> Tensor:
    """[M, N] bool, where `limit` or `guide` removes an entry that is a negative; `own` are the queries' positives."""
    removed = torch.zeros_like(products, dtype=torch.bool)
    if options.limit is not None:
        removed |= products > limit_thresholds(options.limit, products[own])[:, None]
    if options.guide_query is not None and options.guide_passage is not None:
        query, passage = (round_operand(side, precision) for side in (options.guide_query, options.guide_passage))
        guided = query @ passage.T
        removed |= guided > guided[own][:, None] - options.guide_margin
    return removed


def limit_thresholds(limit: NegativeLimit, product: Tensor) -> Tensor:
    """[M]: the largest product of a negative with its query that is not removed, from the product of the positive."""
    thresholds = torch.full_like(product, torch.inf)
    if limit.margin is not None:
        thresholds = product + limit.margin
    if limit.share is not None:
        thresholds = torch.minimum(thresholds, product - (1 - limit.share) * product.abs())
    return thresholds


def _losses(scores: Tensor, weighted: Tensor, positive: Tensor, negative: Tensor, reduction: str, dim: int) -> Tensor:
    """Losses of the rows (dim 1) or columns (dim 0); zero for those without a positive."""
    # Without any negative the sum is zero, and its logarithm has no gradient.
    some = negative.any(dim, keepdim=True)
    negatives = weighted.masked_fill(~negative & some, -torch.inf).logsumexp(dim, keepdim=True)
    negatives = torch.where(some, negatives, -torch.inf)
    if reduction == "sum":
        known = positive.any(dim, keepdim=True)
        positives = scores.masked_fill(~positive & known, -torch.inf).logsumexp(dim, keepdim=True)
        losses = -nn.functional.logsigmoid(positives - negatives)
        return torch.where(known, losses, 0).squeeze(dim)
    losses = torch.where(positive, -nn.functional.logsigmoid(scores - negatives), 0)
    return losses.sum(dim) / positive.sum(dim).clamp(min=1)


def full_matrix_statistics(
    scores: Tensor, entries: Tensor, negative: Tensor, removed: Tensor, positive: Tensor
) -> Statistics:
    """Statistics from S [M, N], the exponents [M, N] that the loss uses, and masks [M, N] of their entries."""
    own = scores.gather(1, positive[:, None])
    rank = 1 + (negative & (scores > own)).sum(1)
    hardest_score, hardest = scores.masked_fill(~negative, -torch.inf).max(1)
    probability = entries.softmax(1)
    entropy = -(probability * entries.log_softmax(1).masked_fill(removed, 0)).sum(1)
    masked = removed.sum(1)
    return Statistics(
        rank=rank,
        hardest=torch.where(negative.any(1), hardest, -1),
        hardest_score=hardest_score,
        entropy=entropy,
        masked=masked,
        accuracy=(rank == 1).to(scores.dtype).mean(),
        mrr=(1 / rank.to(scores.dtype)).mean(),
        masked_share=masked.to(scores.dtype).sum() / removed.numel(),
    )


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
        products = query @ passage.T
        scores = batch.logit_scale * products + logit_bias
        own = torch.zeros_like(scores, dtype=torch.bool)
        own_positive = (torch.arange(len(own), device=own.device), batch.positive)
        own[own_positive] = True
        losses = -nn.functional.logsigmoid(torch.where(own, scores, -scores))
        if batch.query_ids is not None and batch.passage_ids is not None:
            masked = (batch.query_ids[:, None] == batch.passage_ids) & ~own
            losses = losses.masked_fill(masked, 0)
        if batch.excluded is not None:
            losses = losses.masked_fill(excluded_mask(batch), 0)
        if batch.options is not None:
            removed = likely_false_negatives(batch.options, products.detach(), own_positive, precision)
            losses = losses.masked_fill(removed & ~own, 0)
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
