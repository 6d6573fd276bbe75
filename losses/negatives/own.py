"""Own hard negatives of each query: e_i = log Σ_h exp(logit_scale · q_i · v_h) over the rows v_h of query i.

Backward, with p_h = exp(logit_scale · q_i · v_h − e_i) and the upstream gradient g_i:

    dv_h = logit_scale · g_i p_h q_i      dq_i = logit_scale · g_i Σ_h p_h v_h
    d logit_scale = Σ_i Σ_h g_i p_h q_i · v_h
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.checks import accumulator_dtype
from losses.options import Ragged
from losses.precision import Precision, matmul_precision, round_operand


def own_term(
    query: Tensor, own: Ragged, logit_scale: Tensor, precision: Precision, workspace_bytes: int, fused: bool
) -> Tensor:
    """[M] log-sum-exps, minus infinity for a query without own negatives.

    Differentiable once with respect to query, own.values and logit_scale. `fused` uses Triton kernels, whose results
    are deterministic; tiles in PyTorch are so on a CPU.
    """
    if fused:
        from losses.negatives.triton_own import supports

        fused = supports(query)
    return _OwnTerm.apply(query, own.values, logit_scale, own.offsets, precision, workspace_bytes, fused)


class _OwnTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        values: Tensor,
        logit_scale: Tensor,
        offsets: Tensor,
        precision: Precision,
        workspace_bytes: int,
        fused: bool,
    ) -> Tensor:
        if fused:
            from losses.negatives.triton_own import own_forward

            log_sum, products = own_forward(query, values, logit_scale, offsets, precision)
        else:
            with matmul_precision(precision, query.device):
                log_sum, products = _forward(query, values, logit_scale, offsets, precision, workspace_bytes)
        ctx.save_for_backward(query, values, logit_scale, offsets, log_sum, products)
        ctx.precision, ctx.workspace_bytes, ctx.fused = precision, workspace_bytes, fused
        return log_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would accept create_graph=True for a constant upstream gradient and drop second
        # derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError("negatives.own is differentiable once: implementation='full' has second derivatives")
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if ctx.fused:
            from losses.negatives.triton_own import own_backward

            gradients = own_backward(saved, upstream, wanted, ctx.precision)
        else:
            with matmul_precision(ctx.precision, upstream.device):
                gradients = _backward(saved, upstream, wanted, ctx.precision, ctx.workspace_bytes)
        return *gradients, None, None, None, None


def _forward(
    query: Tensor, values: Tensor, logit_scale: Tensor, offsets: Tensor, precision: Precision, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps [M] and products [H] of each own negative with its query."""
    queries = _query_of_rows(offsets, len(values))
    products = torch.empty(len(values), dtype=accumulator_dtype(query.dtype), device=query.device)
    for rows in _chunks(values, workspace_bytes):
        own, of_query = round_operand(values[rows], precision), round_operand(query[queries[rows]], precision)
        torch.sum(own * of_query, 1, out=products[rows])
    # A product of minus infinity would add zero to the sum.
    products.masked_fill_(~products.isfinite(), torch.nan)
    scores = products * logit_scale
    lowest = torch.finfo(scores.dtype).min
    shift = scores.new_full((len(query),), lowest).scatter_reduce_(0, queries, scores, "amax")
    total = torch.zeros_like(shift).index_add_(0, queries, (scores - shift[queries]).exp_())
    return shift + total.log(), products


def _backward(
    saved: tuple[Tensor, ...],
    upstream: Tensor,
    wanted: tuple[bool, bool, bool],
    precision: Precision,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    query, values, logit_scale, offsets, log_sum, products = saved
    want_query, want_values, want_scale = wanted
    queries = _query_of_rows(offsets, len(values))
    weights = (products * logit_scale - log_sum[queries]).exp_() * upstream[queries]
    of_query = torch.zeros(query.shape, dtype=products.dtype, device=query.device) if want_query else None
    of_values = torch.empty_like(values) if want_values else None
    for rows in _chunks(values, workspace_bytes):
        weight = (weights[rows] * logit_scale)[:, None]
        if of_values is not None:
            of_values[rows] = round_operand(query[queries[rows]], precision) * weight
        if of_query is not None:
            of_query.index_add_(0, queries[rows], round_operand(values[rows], precision) * weight)
    return (
        None if of_query is None else of_query.to(query.dtype),
        of_values,
        (weights * products).sum() if want_scale else None,
    )


def _query_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """[H]: the query that each row of the values belongs to."""
    number = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1
    # Offsets on a GPU are not checked: invalid ones have already made the loss NaN.
    return number.clamp_(0, max(0, len(offsets) - 2))


def _chunks(values: Tensor, workspace_bytes: int) -> list[slice]:
    """Slices of rows whose temporaries, three in the accumulator dtype, fit the workspace."""
    size = max(1, workspace_bytes // (3 * 8 * values.shape[1]))
    return [slice(first, min(first + size, len(values))) for first in range(0, len(values), size)]
