"""InfoNCE of a batch so small that launching kernels costs more than running them: the whole matrix, few operations.

Value and gradients are computed together, in forward, from one score matrix in float32; backward only multiplies by the
upstream gradient. For batches whose matrix, with its temporaries, fits the workspace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.batch import ContrastiveBatch, all_finite
from losses.precision import BlockProducts, Precision, plain_arithmetic

# The scores, the probabilities of one direction beside them, and a mask or their half-precision copy.
BYTES_PER_SCORE = 12


def fits_dense(batch: ContrastiveBatch, workspace_bytes: int) -> bool:
    return batch.query.shape[0] * batch.passage.shape[0] * BYTES_PER_SCORE <= workspace_bytes


def dense_loss(batch: ContrastiveBatch, precision: Precision) -> Tensor:
    """Scalar InfoNCE of the batch, differentiable once in query, passage and logit_scale."""
    return _DenseLoss.apply(
        batch.query,
        batch.passage,
        batch.logit_scale,
        batch.positive,
        batch.query_ids,
        batch.passage_ids,
        batch.symmetric,
        batch.diagonal,
        precision,
    )


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, precision = arguments
        batch = ContrastiveBatch(*tensors)
        with plain_arithmetic(precision, batch.query.device):
            loss, *gradients = _value_and_gradients(batch, precision, any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(batch.query, batch.passage, batch.logit_scale, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let create_graph pass when `upstream` is a constant, and second derivatives vanish.
        if torch.is_grad_enabled():
            raise RuntimeError("the dense loss is differentiable once: implementation='full' has second derivatives")
        *leaves, query, passage, scale = ctx.saved_tensors
        factors = (upstream * leaves[2], upstream * leaves[2], upstream)
        found = (
            gradient.mul(factor).to(leaf.dtype) if wanted else None
            for gradient, factor, leaf, wanted in zip(
                (query, passage, scale), factors, leaves, ctx.needs_input_grad[:3], strict=True
            )
        )
        return (*found, *[None] * 6)


def _value_and_gradients(batch: ContrastiveBatch, precision: Precision, gradients: bool) -> tuple[Tensor, ...]:
    """The loss and, if asked for, Σ dS K, Σ dSᵀ Q (without logit_scale) and the gradient of logit_scale."""
    products = BlockProducts(precision, batch.query.device)
    query, passage = products.operand(batch.query), products.operand(batch.passage)
    queries, passages = len(query), len(passage)
    scores = torch.empty(queries, passages, dtype=batch.logit_scale.dtype, device=query.device)
    products.scores(query, passage, scores).mul_(batch.logit_scale)
    place = batch.positive[:, None]
    score = scores.gather(1, place)[:, 0]
    if batch.query_ids is not None and batch.passage_ids is not None:
        masked = (batch.query_ids[:, None] == batch.passage_ids).scatter_(1, place, False)
        scores.masked_fill_(masked, -torch.inf)
    row_shift = scores.logsumexp(1)
    loss = row_shift.mean() - score.mean()
    column_shift = None
    if batch.symmetric:
        column_shift = scores.logsumexp(0)
        loss = (loss + column_shift[batch.positive].mean() - score.mean()) / 2
        if not batch.diagonal or queries != passages:
            owners = torch.zeros_like(column_shift).index_add_(0, batch.positive, torch.ones_like(score))
            # As often as a column is owned; never where it is not, and may hold nothing but masks.
            column_shift = torch.where(owners > 0, column_shift - owners.log(), torch.inf)
    loss = torch.where(all_finite(query, passage), loss, torch.nan)
    if not gradients:
        return loss, *(scores.new_empty(0),) * 3
    share = 1 / queries
    if column_shift is None:
        factor = scores.sub_(row_shift[:, None]).exp_()
    else:
        other = scores - column_shift
        factor = scores.sub_(row_shift[:, None]).exp_().add_(other.exp_()).mul_(0.5)
        del other
    factor.scatter_add_(1, place, -torch.ones_like(place, dtype=factor.dtype))
    factor = products.factor(factor.mul_(share))
    query_sum, passage_sum = (torch.empty_like(side, dtype=scores.dtype) for side in (query, passage))
    products.add_product(query_sum, factor, passage, first=True)
    products.add_product(passage_sum, factor.T, query, first=True)
    return loss, query_sum, passage_sum, (query_sum * query).sum()
