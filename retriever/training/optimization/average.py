"""Exponential moving average of the weights of the towers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from retriever.models.sharded_tensors import local_part


class WeightAverage(nn.Module):
    """The exponential moving average of all trainable weights of a module.

    After step t = 1, 2, … the average is d · average + (1 − d) · weight with d = min(decay, (1 + t) / (10 + t)), so
    that the initial weights are soon forgotten. The average of sharded weights (models/fsdp.py) is sharded like them.

    The averages are buffers of this module: its `state_dict` is a part of checkpoints.

    Args:
        module: the module, on its device.
        decay: largest decay, 0 to below 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self._decay = decay
        # In a list, so that the weights are not registered as parameters of this module.
        self._weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        names = {parameter: name for name, parameter in module.named_parameters()}
        self._names = [names[parameter].replace(".", "/") for parameter in self._weights]
        for name, parameter in zip(self._names, self._weights, strict=True):
            self.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` steps, from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights, averages = self._local_tensors()
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the module has the averages as weights. Afterwards it has its own weights again.

        Weights and averages change places in the same memory, so that CUDA graphs and shards stay valid.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(*self._local_tensors(), strict=True):
            weight_values = weight.clone()
            weight.copy_(average)
            average.copy_(weight_values)

    def _local_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's part of each weight and of each average."""
        buffers = dict(self.named_buffers())
        weights = [local_part(weight.detach()) for weight in self._weights]
        return weights, [local_part(buffers[name]) for name in self._names]
