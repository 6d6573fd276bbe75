"""Packed sequences for MPNet.

MPNet's attention adds a learned bias to every score, so only the attention pads its texts. It does not use
transformers' AttentionInterface, so the forward methods of the model are replaced.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from retriever.models.packed.attention import PackedLayout


def use_packed_attention(model: nn.Module) -> None:
    """Replace the forward methods of a transformers MPNetModel by ones that take packed sequences."""
    encoder: Any = model
    encoder.forward = types.MethodType(_model_forward, encoder)
    for layer in encoder.encoder.layer:
        layer.attention.attn.forward = types.MethodType(_attention_forward, layer.attention.attn)


def _model_forward(model: Any, input_ids: Tensor, position_ids: Tensor, layout: PackedLayout, **_: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    hidden = model.embeddings(input_ids=input_ids, position_ids=position_ids)
    # Only the shape of the argument is used. The bias is [1, heads, max_seqlen, max_seqlen].
    bias = model.encoder.compute_position_bias(hidden.new_empty(1, layout.max_seqlen, 0)).to(hidden.dtype)
    for layer in model.encoder.layer:
        # A layer passes its mask and bias arguments to its attention unchanged.
        hidden = layer(hidden, layout, bias)[0]
    return BaseModelOutput(last_hidden_state=hidden)


def _attention_forward(attention: Any, hidden: Tensor, layout: PackedLayout, bias: Tensor, **_: Any) -> tuple[Tensor]:
    """Map `hidden` [1, tokens, D] to the attention's output of the same shape; `bias` [1, heads, longest, longest]."""
    tokens, texts = hidden.shape[1], len(layout.cu_seqlens) - 1
    position = torch.arange(tokens, device=hidden.device) - layout.start
    text = torch.searchsorted(layout.cu_seqlens, layout.start, right=True) - 1
    padded_row = text * layout.max_seqlen + position

    def pad(projected: Tensor) -> Tensor:
        """[1, tokens, D] -> [texts, heads, longest, width]."""
        padded = projected.new_zeros(texts * layout.max_seqlen, projected.shape[-1])
        padded = padded.index_copy(0, padded_row, projected[0])
        return padded.view(texts, layout.max_seqlen, -1, attention.attention_head_size).transpose(1, 2)

    query, key, value = (pad(projection(hidden)) for projection in (attention.q, attention.k, attention.v))
    is_padding = torch.arange(layout.max_seqlen, device=hidden.device) >= layout.cu_seqlens.diff()[:, None]
    mask = bias.to(query.dtype).masked_fill(is_padding[:, None, None], float("-inf"))
    dropout = attention.dropout.p if attention.training else 0.0
    out = scaled_dot_product_attention(query, key, value, mask, dropout)
    packed = out.transpose(1, 2).reshape(texts * layout.max_seqlen, -1)[padded_row]
    return (attention.o(packed[None]),)
