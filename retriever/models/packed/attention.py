"""Attention over texts laid end to end: Triton kernels on CUDA, PyTorch's own attention text by text elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retriever.utils.device import to_device

# From here on a text has whole tiles of its own, and the tensor library's kernel, tuned for that, is ahead.
LONG = 512


@dataclass(frozen=True)
class Spans:
    """Where the texts of a micro-batch begin and end, for tokens laid end to end."""

    first: Tensor
    """int32 [tokens]: of each token, the first token of its text."""
    end: Tensor
    """int32 [tokens]: of each token, the first token after its text."""
    offsets: Tensor
    """int32 [texts + 1]."""
    longest: int
    """Tokens of the longest text."""
    empty: Tensor | None = None
    """bool [texts]: texts without any token, for each of which one stands; none if there are none."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> Spans:
        """Spans of texts of these lengths (int64 [texts]), on the CPU; an empty text takes the place of one token."""
        empty = None if lengths.all() else torch.from_numpy(lengths == 0)
        lengths = np.maximum(lengths, 1)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        first, end = np.repeat(offsets[:-1], lengths), np.repeat(offsets[1:], lengths)
        longest = int(lengths.max(initial=0))
        return cls(torch.from_numpy(first), torch.from_numpy(end), torch.from_numpy(offsets), longest, empty)

    def to(self, device: torch.device) -> Spans:
        """The same on another device; nothing waits for the copy."""
        first, end, offsets = (to_device(each, device) for each in (self.first, self.end, self.offsets))
        return Spans(first, end, offsets, self.longest, None if self.empty is None else to_device(self.empty, device))


def spans_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    *,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of each token to the tokens of its own text.

    Args:
        query: [tokens, heads, width], of float32, bfloat16 or float16; the last dimension contiguous.
        key: [tokens, key heads, width]; `heads` is a multiple of `key heads` (grouped-query attention).
        value: as `key`.
        spans: the texts, on the same device.
        scale: of the scores before the softmax.
        dropout: part of the attention weights that is left out, drawn from the device's generator.
        causal: a token sees no later one.
        window: a token sees at most this many to either side; all of its text if None.

    Returns:
        [tokens, heads, width], in the dtype of `query`; differentiable once in query, key and value.
    """
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return _text_by_text(query, key, value, spans, scale, dropout, causal, window)
    if spans.longest > LONG and query.dtype in (torch.bfloat16, torch.float16):
        reach = -1 if window is None else window
        # varlen_attn of torch.nn.attention has no dropout; this is what it calls.
        return torch.ops.aten._flash_attention_forward(
            *(query, key, value, spans.offsets, spans.offsets, spans.longest, spans.longest, dropout, causal, False),
            scale=scale,
            window_size_left=reach,
            window_size_right=0 if causal else reach,
        )[0]
    # A scalar on the device, so that the host does not wait; drawn only where used.
    seed = torch.randint(2**31 - 1, (1,), device=query.device) if dropout else spans.first[:1].long()
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    tensors = (query, key, value, spans.first, spans.end, seed)
    settings = (float(scale), float(dropout), bool(causal), -1 if window is None else window)
    # An operator costs the host more a call, and only the compiler needs one.
    if torch.compiler.is_compiling():
        return spans_forward(*tensors, *settings)[0]
    return _SpansAttention.apply(*tensors, *settings)


class _SpansAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _forward(*arguments)
        _keep(ctx, arguments, (out, lse))
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(out_grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 7)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    end: Tensor,
    seed: Tensor,
    scale: float,
    dropout: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    from retriever.models.packed.kernels import forward_kernel

    tokens, heads, _ = query.shape
    out, lse = _forward_shapes(query)
    shape = _shape(query, "forward")
    forward_kernel[(-(-tokens // shape["BLOCK_M"]), heads)](
        *(query, key, value, out, lse, first, end, seed, tokens),
        *_strides(query, key, value),
        *(scale, dropout),
        **_fixed(query, key, dropout, causal, window),
        **shape,
    )
    return out, lse


def _backward(
    out_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    end: Tensor,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from retriever.models.packed.kernels import backward_key_kernel, backward_query_kernel

    tokens, heads, _ = query.shape
    query_grad, key_grad, value_grad = _backward_shapes(query, key, value)
    delta = torch.empty_like(lse)
    strides, fixed = _strides(query, key, value), _fixed(query, key, dropout, causal, window)
    shape = _shape(query, "backward_query")
    backward_query_kernel[(-(-tokens // shape["BLOCK_M"]), heads)](
        *(query, key, value, out, out_grad, lse, delta, query_grad, first, end, seed, tokens),
        *strides,
        *(scale, dropout),
        **fixed,
        **shape,
    )
    shape = _shape(query, "backward_key")
    backward_key_kernel[(-(-tokens // shape["BLOCK_N"]), key.shape[1])](
        *(query, key, value, out_grad, lse, delta, key_grad, value_grad, first, end, seed, tokens),
        *strides,
        *(scale, dropout),
        **fixed,
        **shape,
    )
    return query_grad, key_grad, value_grad


def _forward_shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


def _backward_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)
    )
    return query_grad, key_grad, value_grad


spans_forward = torch.library.custom_op("retriever::spans_forward", _forward, mutates_args=())
spans_forward.register_fake(_forward_shapes)
spans_backward = torch.library.custom_op("retriever::spans_backward", _backward, mutates_args=())
spans_backward.register_fake(lambda out_grad, query, key, value, *_: _backward_shapes(query, key, value))


def _backward_by_operator(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*spans_backward(out_grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 7)


spans_forward.register_autograd(
    _backward_by_operator, setup_context=lambda ctx, inputs, output: _keep(ctx, inputs, output)
)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _fixed(query: Tensor, key: Tensor, dropout: float, causal: bool, window: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    width = query.shape[2]
    return {
        "HEADS": query.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "D": width,
        "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "CAUSAL": causal,
        "WINDOW": window,
        "DROPOUT": dropout > 0,
        "PRODUCT": "ieee",
    }


# Rows and columns of a tile, and warps: measured on one H200 with BERT-base's heads, texts of 10 to 250 tokens.
_SHAPES = {"forward": (64, 32, 4), "backward_query": (64, 32, 4), "backward_key": (64, 32, 2)}


def _shape(query: Tensor, kernel: str) -> dict[str, int]:
    rows, columns, warps = _SHAPES[kernel]
    if query.dtype == torch.float32 or query.shape[2] > 128:
        rows, columns = 32, 32
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps}


def _text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """The definition: PyTorch's attention on each text alone."""
    lengths = spans.offsets.diff().tolist()
    outs = []
    for q, k, v in zip(*(each.split(lengths) for each in (query, key, value)), strict=True):
        mask = None
        if causal or window is not None:
            place = torch.arange(len(q), device=q.device)
            apart = place[:, None] - place
            mask = (apart.abs() <= (len(q) if window is None else window)) & ((apart >= 0) | (not causal))
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
