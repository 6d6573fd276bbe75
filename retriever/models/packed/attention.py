"""Attention over packed sequences: Triton kernels on CUDA; on other devices PyTorch's attention, one text at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retriever.utils.device import to_device

# Longer texts fill whole tiles by themselves, and PyTorch's flash attention is faster.
LONG = 512


@dataclass(frozen=True)
class PackedLayout:
    """Boundaries of the texts of a packed micro-batch, in which texts follow each other without padding."""

    start: Tensor
    """int32 [tokens]: for each token, the position of the first token of its text."""
    end: Tensor
    """int32 [tokens]: for each token, the position after the last token of its text."""
    cu_seqlens: Tensor
    """int32 [texts + 1]: cumulative lengths, starting with 0."""
    max_seqlen: int
    """Number of tokens of the longest text."""
    empty: Tensor | None = None
    """bool [texts]: texts without tokens, each represented by one pad token. None if there are none."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> PackedLayout:
        """Return the layout of texts with these lengths (int64 [texts]), on the CPU. An empty text takes one token."""
        empty = None if lengths.all() else torch.from_numpy(lengths == 0)
        lengths = np.maximum(lengths, 1)
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        start, end = np.repeat(cu_seqlens[:-1], lengths), np.repeat(cu_seqlens[1:], lengths)
        max_seqlen = int(lengths.max(initial=0))
        return cls(torch.from_numpy(start), torch.from_numpy(end), torch.from_numpy(cu_seqlens), max_seqlen, empty)

    def to(self, device: torch.device) -> PackedLayout:
        """Return a copy on another device. The copy is asynchronous."""
        start, end, cu_seqlens = (to_device(tensor, device) for tensor in (self.start, self.end, self.cu_seqlens))
        empty = None if self.empty is None else to_device(self.empty, device)
        return PackedLayout(start, end, cu_seqlens, self.max_seqlen, empty)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Softmax attention in which each token attends to the tokens of its own text.

    Args:
        query: [tokens, heads, width] in float32, bfloat16 or float16.
        key: [tokens, key heads, width] of the same dtype; `heads` is a multiple of `key heads` (grouped-query
            attention).
        value: Shape and dtype of `key`.
        layout: Boundaries of the texts, on the same device.
        scale: Factor of the scores before the softmax.
        dropout: Probability with which an attention weight is dropped. Random numbers come from the device's default
            generator. Default: 0.
        causal: Whether a token attends only to itself and to earlier tokens. Default: False.
        window: Number of tokens on either side that a token attends to. Default: None, the whole text.

    Returns:
        [tokens, heads, width] in the dtype of `query`, differentiable once with respect to query, key and value.
    """
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return _reference_attention(query, key, value, layout, scale, dropout, causal, window)
    if layout.max_seqlen > LONG and query.dtype in (torch.bfloat16, torch.float16):
        window_size = -1 if window is None else window
        # torch.nn.attention.varlen_attn calls this operator, but has no dropout.
        return torch.ops.aten._flash_attention_forward(
            *(query, key, value, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen),
            *(dropout, causal, False),
            scale=scale,
            window_size_left=window_size,
            window_size_right=0 if causal else window_size,
        )[0]
    # The seed stays on the device, so that the host does not synchronize. Without dropout any tensor serves.
    seed = torch.randint(2**31 - 1, (1,), device=query.device) if dropout else layout.start[:1].long()
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tensors = (query, key, value, layout.start, layout.end, seed)
    settings = (float(scale), float(dropout), bool(causal), -1 if window is None else window)
    # Calling a custom operator takes longer on the host; only torch.compile needs it.
    if torch.compiler.is_compiling():
        return packed_attention_forward(*tensors, *settings)[0]
    return _SpansAttention.apply(*tensors, *settings)


class _SpansAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _forward(*arguments)
        _save_for_backward(ctx, arguments, (out, lse))
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(out_grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 7)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
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


packed_attention_forward = torch.library.custom_op("retriever::packed_attention_forward", _forward, mutates_args=())
packed_attention_forward.register_fake(_forward_shapes)
packed_attention_backward = torch.library.custom_op("retriever::packed_attention_backward", _backward, mutates_args=())
packed_attention_backward.register_fake(lambda out_grad, query, key, value, *_: _backward_shapes(query, key, value))


def _backward_by_operator(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*packed_attention_backward(out_grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 7)


packed_attention_forward.register_autograd(
    _backward_by_operator, setup_context=lambda ctx, inputs, output: _save_for_backward(ctx, inputs, output)
)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _fixed(query: Tensor, key: Tensor, dropout: float, causal: bool, window: int) -> dict[str, Any]:
    """Return the compile-time constants that all kernels share."""
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


# Rows and columns of a tile, and warps. The fastest on one H200 with BERT-base's heads and texts of 10 to 250 tokens.
_SHAPES = {"forward": (64, 32, 4), "backward_query": (64, 32, 4), "backward_key": (64, 32, 2)}


def _shape(query: Tensor, kernel: str) -> dict[str, int]:
    rows, columns, warps = _SHAPES[kernel]
    if query.dtype == torch.float32 or query.shape[2] > 128:
        rows, columns = 32, 32
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps}


def _reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attention of each text by PyTorch, one text at a time."""
    lengths = layout.cu_seqlens.diff().tolist()
    outs = []
    for q, k, v in zip(*(each.split(lengths) for each in (query, key, value)), strict=True):
        mask = None
        if causal or window is not None:
            position = torch.arange(len(q), device=q.device)
            distance = position[:, None] - position
            mask = (distance.abs() <= (len(q) if window is None else window)) & ((distance >= 0) | (not causal))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
