"""Pooling of packed sequences: deterministic, and without synchronization with the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retriever.models.packed.attention import PackedLayout

MODES = ("mean", "cls", "lasttoken")


def pool(hidden: Tensor, layout: PackedLayout, mode: str) -> Tensor:
    """Pool token embeddings [tokens, D] to text embeddings [texts, D].

    Args:
        hidden: [tokens, D] token embeddings of packed texts.
        layout: Boundaries of the texts.
        mode: "mean", "cls" (the first token) or "lasttoken".

    Returns:
        [texts, D] in the dtype of `hidden`; zeros for texts without tokens.
    """
    pooled = _pool(hidden, layout, mode)
    return pooled if layout.empty is None else pooled.masked_fill(layout.empty[:, None], 0)


def _pool(hidden: Tensor, layout: PackedLayout, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[layout.cu_seqlens[:-1]]
    if mode == "lasttoken":
        return hidden[layout.cu_seqlens[1:] - 1]
    # Without `unsafe`, the checks of the offsets synchronize with the device.
    return torch.segment_reduce(hidden, "mean", offsets=layout.cu_seqlens.long(), axis=0, unsafe=True)


def pool_features(pooling: Any, features: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Replace `forward` of a sentence-transformers Pooling whose mode is in `MODES`."""
    mode = pooling.pooling_mode
    features["sentence_embedding"] = pool(
        features["token_embeddings"].squeeze(0), features["layout"], mode if isinstance(mode, str) else mode[0]
    )
    return features
