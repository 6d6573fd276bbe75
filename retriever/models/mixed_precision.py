"""Precision in which the towers compute: fp32, autocast, or half-precision copies of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from retriever.models.fsdp import is_sharded
from retriever.models.towers import Towers
from retriever.utils.device import Precision, autocast

Sums = dict[Tensor, Tensor | None]
"""Weight -> sum of its gradients in fp32, None before the first backward pass."""

# The copies live as long as their encoder, because CUDA graphs expect the weights at fixed addresses.
_COPIES: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
_SUMS: WeakKeyDictionary[nn.Module, Sums] = WeakKeyDictionary()


@contextlib.contextmanager
def mixed_precision(towers: Towers, precision: Precision) -> Iterator[None]:
    """Context in which forward and backward of the towers compute in `precision`.

    "bf16" uses bf16 weights and activations. Autocast would cast the weights for every micro-batch and keep the
    residual stream in fp32, at 1.2 times the memory and time (BERT-base on one H200; 1.2 to 1.35 times the time of
    MiniLM on a CPU with AMX). The modules after the encoder (pooling, projection, normalization) compute in fp32. For
    "fp16", and for sharded towers on CPUs, autocast is used.
    """
    sharded = is_sharded(towers)
    if precision == "bf16" and not (sharded and towers.device.type == "cpu"):
        # The weights of sharded towers are gathered in bf16 on GPUs.
        encoders = [] if sharded else towers.encoders
        with half_precision_weights(encoders, torch.bfloat16), fp32_outputs(towers.transformers):
            yield
    else:
        with autocast(towers.device, precision):
            yield


@contextlib.contextmanager
def fp32_outputs(transformers: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which the outputs of these sentence-transformers modules are cast to fp32."""
    # Hooks of the encoder are not called, because sentence-transformers calls its forward method directly.
    handles = [transformer.register_forward_hook(_cast_outputs) for transformer in transformers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def half_precision_weights(encoders: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Context in which the encoders' fp32 weights are replaced by copies in `dtype`.

    On exit the fp32 weights are restored, with fp32 gradients: mixed-precision training with master weights
    (Micikevicius et al., arXiv 1710.03740). The gradients of several backward passes are summed in fp32, each as soon
    as it is complete.
    """
    parameters: list[nn.Parameter] = []
    masters: list[Tensor] = []
    copies: list[Tensor] = []
    encoders = list(encoders)
    for encoder in encoders:
        own = [parameter for parameter in encoder.parameters() if parameter.dtype == torch.float32]
        parameters += own
        masters += [parameter.data for parameter in own]
        copies += _copy_weights(encoder, [parameter.data for parameter in own], dtype)
    sums: Sums = {}
    outer = {encoder: _SUMS.get(encoder) for encoder in encoders}
    _SUMS.update(dict.fromkeys(encoders, sums))
    handles: list[Any] = []
    for parameter, copy in zip(parameters, copies, strict=True):
        sums[parameter], parameter.grad = parameter.grad, None
        parameter.data = copy
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: _accumulate(p, sums)))
    try:
        yield
    finally:
        _SUMS.update({encoder: outer_sums for encoder, outer_sums in outer.items() if outer_sums is not None})
        for encoder in (encoder for encoder, outer_sums in outer.items() if outer_sums is None):
            del _SUMS[encoder]
        for handle in handles:
            handle.remove()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.grad = None
            parameter.data = master
            parameter.grad = sums[parameter]


def gradient_sums(encoder: nn.Module) -> Sums:
    """Return the gradient sums of an encoder inside `half_precision_weights`; empty outside."""
    return _SUMS.get(encoder, {})


def _copy_weights(encoder: nn.Module, masters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies of the master weights in `dtype`, in the same memory at every call."""
    if not masters:
        return []
    copies = _COPIES.get(encoder, [])
    if [(c.shape, c.device, c.dtype) for c in copies] != [(m.shape, m.device, dtype) for m in masters]:
        copies = _COPIES[encoder] = [torch.empty_like(master, dtype=dtype) for master in masters]
    torch._foreach_copy_(copies, masters)
    return copies


def _accumulate(parameter: Tensor, sums: Sums) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    total = sums[parameter]
    sums[parameter] = gradient.float() if total is None else total.add_(gradient)


def _cast_outputs(transformer: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
    for name in ("token_embeddings", "sentence_embedding"):
        if name in output:
            output[name] = output[name].float()
