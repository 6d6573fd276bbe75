"""Own hard negatives of each query by Triton kernels: host launchers (triton/kernels/own.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.precision import Precision

# Values of a block of rows that one program holds in registers.
BLOCK_VALUES = 8192
MAX_DIMENSIONS = 16384


def supports(query: Tensor) -> bool:
    """Whether a row of the embeddings fits the registers of one program."""
    return query.shape[1] <= MAX_DIMENSIONS


def own_forward(
    query: Tensor, values: Tensor, logit_scale: Tensor, offsets: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps [M] and products [H], float32."""
    from losses.triton.kernels.own import own_forward_kernel
    from losses.triton.launch import operand

    rows, values = operand(query, precision), operand(values, precision)
    log_sum = torch.empty(len(query), dtype=torch.float32, device=query.device)
    products = torch.empty(len(values), dtype=torch.float32, device=query.device)
    if len(query):
        own_forward_kernel[(len(query),)](
            rows, values, offsets, logit_scale, products, log_sum, len(values), D=rows.shape[1], **_blocks(rows)
        )
    return log_sum, products


def own_backward(
    saved: tuple[Tensor, ...], upstream: Tensor, wanted: tuple[bool, bool, bool], precision: Precision
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, values and logit_scale; None for those not wanted.

    `saved` are query, values, logit_scale, offsets, and the results of `own_forward`.
    """
    from losses.triton.kernels.own import own_backward_kernel
    from losses.triton.launch import operand

    query, values, logit_scale, offsets, log_sum, products = saved
    want_query, want_values, want_scale = wanted
    rows, own = operand(query, precision), operand(values, precision)
    of_query = torch.empty_like(query, memory_format=torch.contiguous_format) if want_query else None
    of_values = torch.empty_like(values, memory_format=torch.contiguous_format) if want_values else None
    partials = torch.empty_like(log_sum)
    if len(query):
        own_backward_kernel[(len(query),)](
            rows,
            own,
            offsets,
            logit_scale,
            products,
            log_sum,
            upstream.contiguous(),
            rows if of_query is None else of_query,
            own if of_values is None else of_values,
            partials,
            len(values),
            D=query.shape[1],
            WIDTH=rows.shape[1],
            OF_QUERY=want_query,
            OF_VALUES=want_values,
            **_blocks(rows),
        )
    return of_query, of_values, partials.sum() if want_scale else None


def _blocks(rows: Tensor) -> dict[str, Any]:
    import triton

    columns = triton.next_power_of_2(rows.shape[1])
    return {"BLOCK_H": max(1, min(8, BLOCK_VALUES // columns)), "BLOCK_D": columns, "num_warps": 4}
