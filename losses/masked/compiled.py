"""The loss with options under torch.compile, as one custom operator.

The operator computes the loss and its gradients in forward and stores the gradients until backward. This takes (M + N)
· D numbers more memory than without the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from losses.checks import accumulator_dtype, can_check_values, checked_number
from losses.inputs import CheckedOptions, ContrastiveBatch, check_excluded, checked_positive
from losses.masked.loss import negatives_loss
from losses.option_checks.masked import check_positive_pairs
from losses.options import NegativeLimit, Statistics
from losses.precision import Precision
from losses.torch_tiles.sigmoid import saved_gradient_dtype, scale_by_upstream

# Number of fields of `Statistics`, which are outputs of the operator.
STATISTICS = len(dataclasses.fields(Statistics))


def compiled_negatives_loss(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, fused: bool
) -> tuple[Tensor, Statistics | None]:
    """`negatives_loss` of the batch. Differentiable once."""
    options = batch.options
    assert options is not None
    leaves = (batch.query, batch.passage, batch.logit_scale)
    wanted = [torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]
    limit = None if options.limit is None else [options.limit.margin, options.limit.share]
    loss, _, _, _, *statistics = negatives_loss_op(
        *leaves,
        batch.given_positive,
        batch.query_ids,
        batch.passage_ids,
        batch.excluded,
        options.pairs,
        options.guide_query,
        options.guide_passage,
        batch.symmetric,
        batch.diagonal,
        options.reduction,
        None if limit is None else limit[0],
        None if limit is None else limit[1],
        options.guide_margin,
        options.hardness,
        options.statistics,
        precision,
        workspace_bytes,
        fused,
        wanted,
    )
    return loss, Statistics(*(field.detach() for field in statistics)) if options.statistics else None


@torch.library.custom_op("dense_retriever::negatives_loss", mutates_args=())
def negatives_loss_op(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    given_positive: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    excluded: Tensor | None,
    pairs: Tensor | None,
    guide_query: Tensor | None,
    guide_passage: Tensor | None,
    symmetric: bool,
    diagonal: bool,
    reduction: str,
    margin: float | None,
    share: float | None,
    guide_margin: float,
    hardness: float,
    statistics: bool,
    precision: str,
    workspace_bytes: int,
    fused: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients for an upstream gradient of 1, and the fields of `Statistics`.

    The gradients are those of query, passage and logit_scale. What is not wanted is an empty tensor.

    Raises:
        ValueError: If a value is invalid. Values cannot be checked while the graph is compiled.
    """
    checked_number("logit_scale", logit_scale, query)
    checked_positive(given_positive, query, passage, in_range=True)
    if excluded is not None and can_check_values(excluded):
        check_excluded(excluded, given_positive, len(query), len(passage))
    limit = None if margin is None and share is None else NegativeLimit(margin, share)
    options = CheckedOptions(
        pairs, cast(Any, reduction), limit, guide_query, guide_passage, guide_margin, hardness, statistics
    )
    # float16 gradients are stored in float32, because the loss scale that brings them into range arrives in backward.
    wide = [side.to(saved_gradient_dtype(side.dtype)) for side in (query, passage)]
    leaves = [side.detach().requires_grad_(want) for side, want in zip((*wide, logit_scale), wanted, strict=True)]
    masks = (query_ids, passage_ids, symmetric, diagonal, excluded, options)
    batch = ContrastiveBatch(leaves[0], leaves[1], leaves[2], given_positive, *masks)
    check_positive_pairs(batch, len(passage))
    with torch.enable_grad():
        loss, found = negatives_loss(batch, cast(Precision, precision), workspace_bytes, fused)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(loss, asked) if asked else ())
    outputs = [next(gradients) if want else loss.new_empty(0) for want in wanted]
    fields = list(vars(found).values()) if found is not None else [loss.new_empty(0) for _ in range(STATISTICS)]
    # Fields are views of one tensor, which an operator may not return.
    return (loss.detach(), *outputs, *(field.clone() for field in fields))  # type: ignore[return-value]


@negatives_loss_op.register_fake
def _(query: Tensor, passage: Tensor, logit_scale: Tensor, *others: Any) -> tuple[Tensor, ...]:
    loss = query.new_empty((), dtype=accumulator_dtype(query.dtype))
    *_, statistics, _, _, _, wanted = others
    gradients = (
        leaf.new_empty(leaf.shape, dtype=saved_gradient_dtype(leaf.dtype)) if want else loss.new_empty(0)
        for leaf, want in zip((query, passage, logit_scale), wanted, strict=True)
    )
    fields = [loss.new_empty(0) for _ in range(STATISTICS)]
    if statistics:
        counts, numbers = loss.new_empty(len(query), dtype=torch.int64), loss.new_empty(len(query))
        rows = (counts, counts, numbers, numbers, counts)
        fields = [torch.empty_like(each) for each in (*rows, loss, loss, loss)]
    return (loss, *gradients, *fields)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:4])
    ctx.dtypes = tuple(leaf.dtype for leaf in inputs[:3])
    ctx.wanted = inputs[-1]


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    held = tuple(gradient if want else None for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True))
    # All inputs after query, passage and logit_scale have no gradient.
    others = [None] * (len(ctx.needs_input_grad) - 3)
    return (*scale_by_upstream(held, upstream, ctx.dtypes), *others)


negatives_loss_op.register_autograd(_backward, setup_context=_keep_gradients)
