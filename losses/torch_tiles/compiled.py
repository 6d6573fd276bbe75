"""The tiled losses under torch.compile, as one custom operator, so that loops over tiles are not unrolled.

The operator computes the loss and its gradients in forward and stores the gradients until backward. This takes (M + N)
· D numbers more memory than without the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from losses.checks import accumulator_dtype, checked_number
from losses.inputs import ContrastiveBatch, check_excluded, checked_positive
from losses.precision import Precision
from losses.torch_tiles.inf_cl import tiled_loss
from losses.torch_tiles.sigmoid import saved_gradient_dtype, scale_by_upstream, tiled_sigmoid_loss


def compiled_tiled_loss(
    batch: ContrastiveBatch, precision: Precision, workspace_bytes: int, logit_bias: Tensor | None = None
) -> Tensor:
    """`tiled_loss` of the batch, or `tiled_sigmoid_loss` if `logit_bias` is given. Differentiable once.

    Raises:
        ValueError: If the batch has negatives outside the pool, with which the loss is computed outside the graph.
    """
    if batch.further is not None:
        raise ValueError("negatives outside the pool are not part of the operator")
    leaves = (batch.query, batch.passage, batch.logit_scale, logit_bias)
    wanted = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    others = (batch.given_positive, batch.query_ids, batch.passage_ids, batch.symmetric, batch.diagonal, batch.excluded)
    loss, *_ = tiled_loss_op(*leaves, *others, precision, workspace_bytes, wanted)
    return loss


@torch.library.custom_op("dense_retriever::tiled_loss", mutates_args=())
def tiled_loss_op(
    query: Tensor,
    passage: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    given_positive: Tensor | None,
    query_ids: Tensor | None,
    passage_ids: Tensor | None,
    symmetric: bool,
    diagonal: bool,
    excluded: Tensor | None,
    precision: str,
    workspace_bytes: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients for an upstream gradient of 1.

    The gradients are those of query, passage, logit_scale and logit_bias. Those that are not `wanted` are empty
    tensors.

    Raises:
        ValueError: If a value is invalid. Values cannot be checked while the graph is compiled.
    """
    checked_number("logit_scale", logit_scale, query)
    if logit_bias is not None:
        checked_number("logit_bias", logit_bias, query)
    checked_positive(given_positive, query, passage, in_range=True)
    if excluded is not None and excluded.device.type == "cpu":
        check_excluded(excluded, given_positive, len(query), len(passage))
    # float16 gradients are stored in float32, because the loss scale that brings them into range arrives in backward.
    wide = [side.to(saved_gradient_dtype(side.dtype)) for side in (query, passage)]
    leaves = [
        side.detach().requires_grad_(want)
        for side, want in zip((*wide, logit_scale, logit_bias), wanted, strict=True)
        if side is not None
    ]
    masks = (query_ids, passage_ids, symmetric, diagonal, excluded)
    batch = ContrastiveBatch(leaves[0], leaves[1], leaves[2], given_positive, *masks)
    with torch.enable_grad():
        if logit_bias is None:
            loss = tiled_loss(batch, cast(Precision, precision), workspace_bytes)
        else:
            loss = tiled_sigmoid_loss(batch, leaves[3], cast(Precision, precision), workspace_bytes)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, asked) if asked else ())
    gradients = [next(found) if want else loss.new_empty(0) for want in wanted]
    return (loss.detach(), *gradients)  # type: ignore[return-value]


@tiled_loss_op.register_fake
def _(
    query: Tensor, passage: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    loss = query.new_empty((), dtype=accumulator_dtype(query.dtype))
    leaves = (query, passage, logit_scale, logit_bias)
    return loss, *(
        leaf.new_empty(leaf.shape, dtype=saved_gradient_dtype(leaf.dtype))
        if want and leaf is not None
        else loss.new_empty(0)
        for leaf, want in zip(leaves, others[-1], strict=True)
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = tuple(torch.float32 if leaf is None else leaf.dtype for leaf in inputs[:4])
    ctx.wanted = inputs[-1]


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    held = tuple(gradient if want else None for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True))
    return (*scale_by_upstream(held, upstream, ctx.dtypes), *[None] * 9)


tiled_loss_op.register_autograd(_backward, setup_context=_keep_gradients)
