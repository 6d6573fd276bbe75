"""MPNet without padding: only its attention, which adds a learned bias to every score, lays texts side by side.

Its attention is not behind transformers' interface, so the forward methods are replaced on the model itself.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from retriever.models.packed.attention import Spans


def read_spans(model: nn.Module) -> None:
    """Have a transformers MPNetModel take texts laid end to end."""
    encoder: Any = model
    encoder.forward = types.MethodType(_model_forward, encoder)
    for layer in encoder.encoder.layer:
        layer.attention.attn.forward = types.MethodType(_attention_forward, layer.attention.attn)


def _model_forward(model: Any, input_ids: Tensor, position_ids: Tensor, spans: Spans, **_: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    hidden = model.embeddings(input_ids=input_ids, position_ids=position_ids)
    # Of the shape only: a bias for each pair of places in the longest text.
    bias = model.encoder.compute_position_bias(hidden.new_empty(1, spans.longest, 0)).to(hidden.dtype)
    for layer in model.encoder.layer:
        # A layer hands mask and bias on to its attention as they are.
        hidden = layer(hidden, spans, bias)[0]
    return BaseModelOutput(last_hidden_state=hidden)


def _attention_forward(attention: Any, hidden: Tensor, spans: Spans, bias: Tensor, **_: Any) -> tuple[Tensor]:
    """[1, tokens, D] in and out; `bias` [1, heads, longest, longest]."""
    tokens, texts = hidden.shape[1], len(spans.offsets) - 1
    place = torch.arange(tokens, device=hidden.device) - spans.first
    text = torch.searchsorted(spans.offsets, spans.first, right=True) - 1
    cell = text * spans.longest + place

    def side_by_side(projected: Tensor) -> Tensor:
        """[1, tokens, D] -> [texts, heads, longest, width]."""
        padded = projected.new_zeros(texts * spans.longest, projected.shape[-1]).index_copy(0, cell, projected[0])
        return padded.view(texts, spans.longest, -1, attention.attention_head_size).transpose(1, 2)

    query, key, value = (side_by_side(project(hidden)) for project in (attention.q, attention.k, attention.v))
    absent = torch.arange(spans.longest, device=hidden.device) >= spans.offsets.diff()[:, None]
    mask = bias.to(query.dtype).masked_fill(absent[:, None, None], float("-inf"))
    dropout = attention.dropout.p if attention.training else 0.0
    mixed = scaled_dot_product_attention(query, key, value, mask, dropout)
    laid_out = mixed.transpose(1, 2).reshape(texts * spans.longest, -1)[cell]
    return (attention.o(laid_out[None]),)
