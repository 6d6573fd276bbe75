"""Sigmoid loss over in-batch and hard negatives: the public function and the choice of implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from losses.distributed.api import distributed_batch
from losses.distributed.sigmoid import sigmoid_loss_over_ranks
from losses.inputs import (
    check_choice,
    checked_batch,
    checked_number,
    checked_workspace,
    with_checked_pairs,
)
from losses.precision import Precision, resolve_precision
from losses.reference import full_matrix_sigmoid_loss
from losses.torch_tiles.compiled import compiled_tiled_loss
from losses.torch_tiles.sigmoid import tiled_sigmoid_loss
from losses.triton.launch import warn_of_step_down, why_not_fused
from losses.triton.sigmoid import fused_sigmoid_loss

Implementation = Literal["auto", "full", "chunked", "triton"]


def sigmoid_loss(
    query: Tensor,
    passage: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    positive: Tensor | None = None,
    excluded: Tensor | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    group: Any = None,
    precision: Precision = "auto",
    implementation: Implementation = "auto",
    workspace_mib: float = 256,
) -> Tensor:
    """Sigmoid loss (SigLIP: Zhai et al., arXiv 2303.15343) in memory linear in the batch.

    With x = logit_scale · Q Kᵀ + logit_bias [M, N] and p(i) the positive of query i, each pair is a decision of its
    own: the loss is −1/M Σ_ij log σ(z_ij x_ij), with z = 1 where j = p(i) and −1 elsewhere.

    Args:
        query: [M, D] embeddings; float32, bfloat16, float16 (or float64, computed in float64).
        passage: [N, D] embeddings of the same dtype on the same device. Rows that are nobody's positive are hard
            negatives of every query.
        logit_scale, logit_bias: numbers or 0-dim floating-point tensors, which then get their gradients. The paper
            begins with 10 and −10: nearly all pairs are negatives, and the bias says so from the first step.
        positive: [M] integers, the row of each query's positive in `passage`; by default 0 … M−1. Queries may share
            a positive.
        excluded: [R, 2] integers (query row, passage row): pairs that are left out, as in `inf_cl_loss`.
        query_ids, passage_ids: [M] and [N] integers. Pair (i, j) is left out when passage_ids[j] == query_ids[i] and
            j != positive[i]. query_ids defaults to passage_ids[positive].
        group: None, or a process group whose ranks each hold a shard of one batch, as in `inf_cl_loss`: the value is
            that of the whole batch, the same on every rank, and gradients averaged over ranks are those of the whole
            batch. distributed/sigmoid.py counts what is sent, all of it in forward.
        precision: of the products' operands, as for `inf_cl_loss`; sums are float32 always.
        implementation: "full" (whole matrix, plain autograd: the oracle), "chunked" (tiles in PyTorch), "triton" (a
            kernel for GPUs of compute capability 9.0 on; elsewhere "chunked", with one warning that says why), or
            "auto": on a GPU triton where it runs, otherwise chunked.
        workspace_mib: MiB that tiles and their temporaries may take beside inputs and gradients.

    Returns:
        0-dim loss, float32 (float64 for float64 embeddings); not finite when an embedding is not. Except with "full"
        it is differentiable once, and its gradients are computed with it, where any is asked for: they are held
        until backward, which multiplies them by the upstream gradient.

    Raises:
        ValueError: an argument does not fit; the message begins with its name. To look at values of CUDA tensors would
            wait for the device: there numbers that are not finite, an excluded pair that does not fit, and for the
            kernel a positive that is no passage, make the loss NaN ("full" and "chunked" end in torch's own assertion).
    """
    if group is not None:
        ranked = distributed_batch(
            group,
            query,
            passage,
            logit_scale,
            positive,
            query_ids,
            passage_ids,
            excluded,
            symmetric=True,
            precision=precision,
            implementation=implementation,
            exchange="ring",
            workspace_mib=workspace_mib,
            checks=lambda: _described(checked_number("logit_bias", logit_bias, query)),
        )
        return sigmoid_loss_over_ranks(ranked, checked_number("logit_bias", logit_bias, query))
    check_choice("implementation", implementation, Implementation)
    workspace_bytes = checked_workspace(workspace_mib)
    # A pair counts for its query and its passage alike, and tiles of a symmetric loss have the second buffer it needs.
    batch = checked_batch(query, passage, logit_scale, positive, query_ids, passage_ids, True, excluded)
    bias = checked_number("logit_bias", logit_bias, query)
    precision = resolve_precision(precision, query)
    if implementation == "full":
        return full_matrix_sigmoid_loss(with_checked_pairs(batch, len(passage)), bias, precision)
    if implementation == "triton" or (implementation == "auto" and query.is_cuda):
        reason = why_not_fused(query)
        if reason is None:
            return fused_sigmoid_loss(batch, bias, precision, workspace_bytes)
        if implementation == "triton":
            warn_of_step_down("triton", reason)
    batch = with_checked_pairs(replace(batch, given=batch.positive), len(passage))
    if torch.compiler.is_compiling():
        return compiled_tiled_loss(batch, precision, workspace_bytes, bias)
    return tiled_sigmoid_loss(batch, bias, precision, workspace_bytes)


def _described(logit_bias: Tensor) -> dict[str, Any]:
    """What must be the same of it on all ranks; to look at a GPU's number would wait for it."""
    number = logit_bias.item() if logit_bias.device.type == "cpu" else "on a device"
    learned = torch.is_grad_enabled() and logit_bias.requires_grad
    return {"logit_bias": number, "requires_grad of logit_bias": learned}
