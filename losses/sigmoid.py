"""Sigmoid loss with in-batch and hard negatives: the public function and the choice of implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from losses.checks import check_choice, checked_number, checked_workspace
from losses.distributed.api import distributed_batch
from losses.distributed.sigmoid import sigmoid_loss_over_ranks
from losses.inputs import ContrastiveBatch, checked_batch, with_nan_for_invalid_pairs
from losses.masked.sigmoid import masked_sigmoid_loss, masked_sigmoid_loss_over_ranks
from losses.option_checks.combinations import given_options
from losses.option_checks.masked import with_nan_for_invalid_positives, with_options
from losses.options import Negatives
from losses.precision import Precision, resolve_precision
from losses.reference import full_matrix_sigmoid_loss
from losses.torch_tiles.compiled import compiled_tiled_loss
from losses.torch_tiles.sigmoid import tiled_sigmoid_loss
from losses.triton.launch import warn_fallback, why_not_fused
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
    negatives: Negatives | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    group: Any = None,
    precision: Precision = "auto",
    implementation: Implementation = "auto",
    workspace_mib: float = 256,
) -> Tensor:
    """Sigmoid loss with memory linear in the batch size.

    The loss is that of SigLIP (Zhai et al., arXiv 2303.15343). The score matrix is computed in tiles and never stored.

    Let x = logit_scale · Q Kᵀ + logit_bias [M, N] and let p(i) be the row of query i's positive in `passage`. Each
    pair is a binary classification: the loss is −1/M Σ_ij log σ(z_ij x_ij), with z_ij = 1 if j = p(i) and −1
    otherwise.

    Args:
        query: [M, D] query embeddings, in float32, bfloat16, float16 or float64. float64 embeddings are computed in
            float64.
        passage: [N, D] passage embeddings, of the same dtype and on the same device as `query`. A passage that is the
            positive of no query is a hard negative of every query.
        logit_scale: 1 / temperature, as a number or a 0-dim floating-point tensor. A tensor that requires a gradient
            receives one. The paper initializes it to 10.
        logit_bias: Bias of all scores, as a number or a 0-dim floating-point tensor. A tensor that requires a gradient
            receives one. The paper initializes it to −10, because nearly all pairs are negatives.
        positive: [M] integers, the row of each query's positive in `passage`. Default: 0, …, M − 1. Queries may share
            a positive.
        excluded: [R, 2] integers, pairs (query row, passage row) that are left out of the sum, as in `inf_cl_loss`.
            Default: None.
        negatives: `limit` and `guide` remove negatives that are probably false, as in `inf_cl_loss`; `hardness` does
            not apply. Outside of `torch.compile`, with "full" or tiles in PyTorch ("chunked"), which "auto" then
            chooses. Default: None.
        query_ids: [M] integers. Default: `passage_ids[positive]`. Requires `passage_ids`.
        passage_ids: [N] integers. Pair (i, j) is left out of the sum if passage_ids[j] == query_ids[i] and j !=
            positive[i]. Default: None, no masking by ids.
        group: A `torch.distributed` process group whose ranks each hold a shard of one batch, as in `inf_cl_loss`, or
            None. Default: None. The value is that of the whole batch and is the same on every rank. Gradients averaged
            over ranks are those of the whole batch. All communication takes place in forward;
            `losses/distributed/sigmoid.py` counts the bytes sent.
        precision: Precision of the operands of the matrix products, as in `inf_cl_loss`: "fp32", "tf32", "bf16" or
            "auto". Sums are always accumulated in float32. Default: "auto".
        implementation: How the loss is computed. "full": the whole matrix with plain autograd, the reference.
            "chunked": tiles in PyTorch, on any device. "triton": tiles with a Triton kernel, for GPUs of compute
            capability 9.0 or newer; if it cannot run, "chunked" is used, with one warning that states the reason.
            "auto": on a GPU "triton" if available, otherwise "chunked". With a group, "full" is not available. Default:
            "auto".
        workspace_mib: Memory in MiB for tiles and temporaries, in addition to inputs and gradients. Default: 256.

    Returns:
        0-dim loss in float32 (float64 for float64 embeddings). It is not finite if an embedding is not finite. Except
        with "full", it is differentiable once, and forward computes the gradients that are required and stores them
        until backward, which multiplies them by the upstream gradient.

    Raises:
        ValueError: If an argument is invalid. The message begins with the argument's name. With a group, every rank
            raises. Values of CUDA tensors are not read, because this would synchronize with the device. For CUDA
            tensors, a non-finite `logit_scale` or `logit_bias`, an invalid pair in `excluded` and, for the kernel, an
            out-of-range `positive` make the loss NaN; "full" and "chunked" fail with PyTorch's own device-side
            assertion for an out-of-range `positive`.
    """
    if group is not None:

        def checks() -> dict[str, Any]:
            _check_negatives(negatives, implementation)
            return _logit_bias_properties(checked_number("logit_bias", logit_bias, query))

        sharded = distributed_batch(
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
            # Tiles in PyTorch have limit and guide.
            implementation="chunked" if negatives is not None and implementation == "auto" else implementation,
            exchange="ring",
            workspace_mib=workspace_mib,
            negatives=negatives,
            checks=checks,
        )
        bias = checked_number("logit_bias", logit_bias, query)
        loss_of_ranks = sigmoid_loss_over_ranks if sharded.batch.options is None else masked_sigmoid_loss_over_ranks
        return loss_of_ranks(sharded, bias)
    check_choice("implementation", implementation, Implementation)
    workspace_bytes = checked_workspace(workspace_mib)
    # symmetric=True: gradients flow to both sides, and the tiles of a symmetric loss have the second buffer it needs.
    batch = checked_batch(query, passage, logit_scale, positive, query_ids, passage_ids, True, excluded)
    batch = _with_negatives(batch, negatives, implementation)
    bias = checked_number("logit_bias", logit_bias, query)
    precision = resolve_precision(precision, query)
    if implementation == "full":
        return full_matrix_sigmoid_loss(with_nan_for_invalid_pairs(batch, len(passage)), bias, precision)
    if implementation == "triton" or (implementation == "auto" and query.is_cuda and batch.options is None):
        reason = why_not_fused(query)
        if reason is None:
            return fused_sigmoid_loss(batch, bias, precision, workspace_bytes)
        if implementation == "triton":
            warn_fallback("triton", reason)
    batch = with_nan_for_invalid_pairs(replace(batch, given_positive=batch.positive), len(passage))
    if torch.compiler.is_compiling():
        return compiled_tiled_loss(batch, precision, workspace_bytes, bias)
    loss_of = tiled_sigmoid_loss if batch.options is None else masked_sigmoid_loss
    return loss_of(batch, bias, precision, workspace_bytes)


def _with_negatives(
    batch: ContrastiveBatch, negatives: Negatives | None, implementation: Implementation
) -> ContrastiveBatch:
    """The batch with `limit` and `guide`; the batch itself if neither is given."""
    _check_negatives(negatives, implementation)
    batch = with_options(batch, None, negatives, False)
    if batch.options is None:
        return batch
    if torch.compiler.is_compiling():
        raise ValueError("negatives is not supported by the sigmoid loss under torch.compile")
    return with_nan_for_invalid_positives(batch, len(batch.passage))


def _check_negatives(negatives: Negatives | None, implementation: str) -> None:
    """Check that the loss has the options that are given.

    Raises:
        ValueError: If it has not. The message begins with the name of one.
    """
    given = given_options(None, negatives, False)
    if others := given - {"negatives.limit", "negatives.guide"}:
        raise ValueError(f"{min(others)} does not apply to the sigmoid loss")
    if given and implementation == "triton":
        raise ValueError("implementation 'triton' of the sigmoid loss does not support negatives: use 'auto'")


def _logit_bias_properties(logit_bias: Tensor) -> dict[str, Any]:
    """Properties of logit_bias that must match on all ranks; a GPU tensor's value is not read."""
    number = logit_bias.item() if logit_bias.device.type == "cpu" else "on a device"
    learned = torch.is_grad_enabled() and logit_bias.requires_grad
    return {"logit_bias": number, "requires_grad of logit_bias": learned}
