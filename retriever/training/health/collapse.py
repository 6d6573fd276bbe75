"""Detection of collapse: embeddings that are all alike, gradients that are zero, weights that are zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_RANK = 1.5
"""Effective rank below which the embeddings of a batch are the same vector, up to noise."""
MAX_ROWS = 256
"""Maximum number of embeddings that are used. With fewer than MIN_ROWS embeddings or dimensions, the rank is low in any
case."""
MIN_ROWS = 8


def effective_rank(embeddings: Tensor) -> float | None:
    """Return the effective rank of embeddings [n, D], from 1 to min(n, D).

    This is the exponential of the entropy of their normalized singular values (RankMe, arXiv 2210.02885). At most the
    first MAX_ROWS embeddings count.

    Returns:
        The rank, or None if there are fewer than MIN_ROWS embeddings or dimensions, or if they are zero or not finite.
    """
    if min(embeddings.shape) < MIN_ROWS:
        return None
    rows = embeddings.detach()[:MAX_ROWS].double().cpu()
    if not torch.isfinite(rows).all():
        return None
    # The Gram matrix has at most MAX_ROWS rows; an SVD of the embeddings would take longer.
    singular = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0).sqrt()
    if not singular.any():
        return None
    share = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def zero_weights(module: nn.Module) -> list[str]:
    """Return the names of the weights of two or more dimensions that are zero everywhere. Waits for the device once."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.ndim > 1}
    if not weights:
        return []
    any_ = torch.stack([weight.detach().any() for weight in weights.values()]).tolist()
    return [name for name, found in zip(weights, any_, strict=True) if not found]
