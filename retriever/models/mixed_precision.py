"""The towers' arithmetic: fp32, autocast, or weights that are themselves of half precision while they are used."""

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
"""fp32 gradients of weights so far, none before the first."""

# Of each encoder, for as long as it lives: CUDA graphs count on finding the weights where they were.
_HALVES: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
_SUMS: WeakKeyDictionary[nn.Module, Sums] = WeakKeyDictionary()


@contextlib.contextmanager
def mixed_precision(towers: Towers, precision: Precision) -> Iterator[None]:
    """Within, the towers compute in `precision`, forward and backward.

    On a GPU, bf16 means bf16 weights and activations: autocast casts the weights anew for every micro-batch and keeps
    the residual stream in fp32, at 1.2 times the memory and time (BERT-base on one H200). What follows the encoder
    (pooling, projection, normalisation) stays in fp32. Elsewhere, and in fp16, it means autocast.
    """
    device = towers.device
    if precision == "bf16" and device.type == "cuda":
        # The weights of divided towers are gathered in bf16.
        encoders = [] if is_sharded(towers) else towers.encoders
        with half_precision_weights(encoders, torch.bfloat16), fp32_outputs(towers.transformers):
            yield
    else:
        with autocast(device, precision):
            yield


@contextlib.contextmanager
def fp32_outputs(transformers: Iterable[nn.Module]) -> Iterator[None]:
    """Within, what these modules of sentence-transformers give to the next is fp32."""
    # A hook of the encoder inside would not be called: sentence-transformers calls its forward method by name.
    handles = [transformer.register_forward_hook(_in_full_precision) for transformer in transformers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def half_precision_weights(encoders: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within, the encoders' fp32 weights are of `dtype`; afterwards they are what they were, with fp32 gradients.

    As mixed-precision training keeps fp32 master weights (Micikevicius et al., arXiv 1710.03740). The gradients of
    several backward passes are summed in fp32, each as soon as it is complete.
    """
    parameters: list[nn.Parameter] = []
    masters: list[Tensor] = []
    halves: list[Tensor] = []
    encoders = list(encoders)
    for encoder in encoders:
        own = [parameter for parameter in encoder.parameters() if parameter.dtype == torch.float32]
        parameters += own
        masters += [parameter.data for parameter in own]
        halves += _halves(encoder, [parameter.data for parameter in own], dtype)
    sums: Sums = {}
    outer = {encoder: _SUMS.get(encoder) for encoder in encoders}
    _SUMS.update(dict.fromkeys(encoders, sums))
    handles: list[Any] = []
    for parameter, half in zip(parameters, halves, strict=True):
        sums[parameter], parameter.grad = parameter.grad, None
        parameter.data = half
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: _fold(p, sums)))
    try:
        yield
    finally:
        _SUMS.update({encoder: found for encoder, found in outer.items() if found is not None})
        for encoder in (encoder for encoder, found in outer.items() if found is None):
            del _SUMS[encoder]
        for handle in handles:
            handle.remove()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.grad = None
            parameter.data = master
            parameter.grad = sums[parameter]


def gradient_sums(encoder: nn.Module) -> Sums:
    """Where the gradients of an encoder's weights are summed: of those that are half ones at the moment."""
    return _SUMS.get(encoder, {})


def _halves(encoder: nn.Module, masters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The masters in `dtype`, in the same memory each time."""
    if not masters:
        return []
    halves = _HALVES.get(encoder, [])
    if [(h.shape, h.device, h.dtype) for h in halves] != [(m.shape, m.device, dtype) for m in masters]:
        halves = _HALVES[encoder] = [torch.empty_like(master, dtype=dtype) for master in masters]
    torch._foreach_copy_(halves, masters)
    return halves


def _fold(parameter: Tensor, sums: Sums) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    so_far = sums[parameter]
    sums[parameter] = gradient.float() if so_far is None else so_far.add_(gradient)


def _in_full_precision(transformer: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
    for name in ("token_embeddings", "sentence_embedding"):
        if name in output:
            output[name] = output[name].float()
