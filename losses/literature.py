"""Losses of the literature by their names, as their papers write them: baselines to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from losses.batch import checked_batch


def clip_loss(query: Tensor, passage: Tensor, *, logit_scale: float | Tensor) -> Tensor:
    """CLIP's symmetric loss over the full matrix (Radford et al., arXiv 2103.00020, figure 3).

    query and passage: [N, D] of one dtype and device, row i of each a pair. logit_scale: 1 / temperature, a number or
    a 0-dim tensor. Products and softmaxes follow the inputs' dtype and autocast, as in the original; memory is
    several times N². Returns a 0-dim loss. Raises ValueError, naming the argument, as `inf_cl_loss` does, and when
    the two have different lengths.
    """
    if isinstance(query, Tensor) and isinstance(passage, Tensor) and query.shape[:1] != passage.shape[:1]:
        raise ValueError(f"passage has {len(passage)} rows, query has {len(query)}: clip_loss pairs them")
    batch = checked_batch(query, passage, logit_scale, None, None, None, symmetric=True)
    logits = batch.logit_scale * (query @ passage.T)
    labels = torch.arange(query.shape[0], device=query.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
