"""Pooling of texts laid end to end, without waiting for the device and with the same sums every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retriever.models.packed.attention import Spans

MODES = ("mean", "cls", "lasttoken")


def pool(hidden: Tensor, spans: Spans, mode: str) -> Tensor:
    """Token vectors [tokens, D] to text vectors [texts, D]: their mean, the first or the last; zeros if empty."""
    pooled = _pool(hidden, spans, mode)
    return pooled if spans.empty is None else pooled.masked_fill(spans.empty[:, None], 0)


def _pool(hidden: Tensor, spans: Spans, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[spans.offsets[:-1]]
    if mode == "lasttoken":
        return hidden[spans.offsets[1:] - 1]
    # `unsafe` leaves out checks of the offsets that the host would wait for.
    return torch.segment_reduce(hidden, "mean", offsets=spans.offsets.long(), axis=0, unsafe=True)


def pool_features(pooling: Any, features: dict[str, Any], **_: Any) -> dict[str, Any]:
    """In place of the forward method of a sentence-transformers Pooling of one of `MODES`."""
    mode = pooling.pooling_mode
    features["sentence_embedding"] = pool(
        features["token_embeddings"].squeeze(0), features["spans"], mode if isinstance(mode, str) else mode[0]
    )
    return features
