"""Average gradients over ranks, once per step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from retriever.distributed.ranks import Ranks

# Gradients with fewer elements are sent as one vector: the latency of a transfer is that of some hundred KiB.
_MIN_SEPARATE_ELEMENTS = 1 << 20


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace each gradient by its mean over ranks, bitwise equal on all ranks.

    Large gradients are reduced in place and small ones as one vector, all asynchronously. The gradients of sharded
    parameters (models/fsdp.py) are skipped, because FSDP has averaged them.

    Args:
        parameters: parameters in the same order on all ranks. The same parameters must have a gradient on all ranks.
        ranks: the ranks to average over.
    """
    if ranks.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    small = [gradient for gradient in gradients if gradient.numel() < _MIN_SEPARATE_ELEMENTS]
    large = [gradient for gradient in gradients if gradient.numel() >= _MIN_SEPARATE_ELEMENTS]
    vectors = [parameters_to_vector(small)] if small else []
    works = [torch.distributed.all_reduce(gradient, group=ranks.group, async_op=True) for gradient in large + vectors]
    for work in works:
        work.wait()
    for gradient in large + vectors:
        gradient.div_(ranks.world_size)
    for vector in vectors:
        vector_to_parameters(vector, small)
