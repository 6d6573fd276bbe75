"""InfoNCE of a batch so small that launching kernels costs more than running them: the whole matrix, few operations.

Value and gradients are computed together, in forward, from one score matrix in float32; backward only multiplies by the
upstream gradient. For batches whose matrix, with its temporaries, fits the workspace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.batch import ContrastiveBatch
from losses.precision import BlockProducts, Precision, plain_arithmetic

# Scores, the softmaxes of two directions, and a mask or a copy in half precision.
BYTES_PER_SCORE = 16


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
        through_mean = upstream / len(leaves[0])
        through_scores = through_mean * leaves[2]
        factors = (through_scores, through_scores, through_mean)
        found = (
            gradient.mul(factor).to(leaf.dtype) if wanted else None
            for gradient, factor, leaf, wanted in zip(
                (query, passage, scale), factors, leaves, ctx.needs_input_grad[:3], strict=True
            )
        )
        return (*found, *[None] * 6)


def _value_and_gradients(batch: ContrastiveBatch, precision: Precision, gradients: bool) -> tuple[Tensor, ...]:
    """The loss and, if asked for, the sums M · dS K [M, D], M · dSᵀ Q [N, D] and M · Σ dS ∘ (Q Kᵀ)."""
    products = BlockProducts(precision, batch.query.device)
    query, passage = products.operand(batch.query), products.operand(batch.passage)
    scores = torch.empty(len(query), len(passage), dtype=batch.logit_scale.dtype, device=query.device)
    products.scores(query, passage, scores).mul_(batch.logit_scale)
    # A negative of minus infinity everywhere would vanish from the softmaxes: any number that is not finite gives NaN.
    zero = scores.sum().mul_(0)
    place = batch.positive[:, None]
    if batch.query_ids is not None and batch.passage_ids is not None:
        masked = (batch.query_ids[:, None] == batch.passage_ids).scatter_(1, place, False)
        scores.masked_fill_(masked, -torch.inf)
    factor = scores.log_softmax(1)
    share = factor.gather(1, place)
    if batch.symmetric:
        # torch's own log_softmax over the first dimension took five times as long.
        of_columns = scores.sub_(scores.logsumexp(0))
        share = (share + of_columns.gather(1, place)).mul_(0.5)
    loss = zero - share.mean()
    if not gradients:
        return loss, *(loss.new_empty(0),) * 3
    factor.exp_()
    if batch.symmetric:
        of_columns.exp_()
        if not batch.diagonal or len(query) != len(passage):
            owners = of_columns.new_zeros(len(passage)).index_add_(0, batch.positive, of_columns.new_ones(len(query)))
            # As often as a column is owned; never where it is not, and may hold nothing but masks.
            of_columns = torch.where(owners > 0, of_columns.mul_(owners), 0)
        factor.add_(of_columns).mul_(0.5)
    factor = products.factor(factor.scatter_(1, place, -1.0, reduce="add"))
    query_sum, passage_sum = (torch.empty_like(side, dtype=loss.dtype) for side in (query, passage))
    products.add_product(query_sum, factor, passage, first=True)
    products.add_product(passage_sum, factor.T, query, first=True)
    return loss, query_sum, passage_sum, torch.dot(query_sum.view(-1), query.to(loss.dtype).view(-1))
