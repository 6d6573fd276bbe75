"""Gradients over ranks: averaged once a step, however many micro-batches have added to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from retriever.distributed.ranks import Ranks

# Smaller gradients travel together: a transfer costs as much time as some hundred KiB.
_TOGETHER = 1 << 20


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace each gradient by its mean over ranks, the same bits on all. The same ones have a gradient everywhere.

    Large gradients are exchanged in place, small ones as one vector, all at the same time. Those of divided towers
    (models/fsdp.py) are means already.
    """
    if ranks.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    small = [gradient for gradient in gradients if gradient.numel() < _TOGETHER]
    large = [gradient for gradient in gradients if gradient.numel() >= _TOGETHER]
    vectors = [parameters_to_vector(small)] if small else []
    works = [torch.distributed.all_reduce(each, group=ranks.group, async_op=True) for each in large + vectors]
    for work in works:
        work.wait()
    for each in large + vectors:
        each.div_(ranks.world_size)
    for vector in vectors:
        vector_to_parameters(vector, small)
