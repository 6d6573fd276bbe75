"""Tensors of which each process may hold a part, as fsdp.py divides those of towers: whole, in part, clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors where they are to be kept, nothing elsewhere; what was divided is on the host. All processes call
    it."""
    found = {}
    for name, tensor in tensors.items():
        # One after another: the device has room for one.
        full = full_tensor(tensor.detach())
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, as `example` is divided."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    # Each takes its part of what it has read.
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """The L2 norm of all gradients, whole, as a 0-dim tensor; a larger one than `limit` is scaled down to it.

    As `torch.nn.utils.clip_grad_norm_`, which does not take whole and divided ones together.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in with_gradient if isinstance(p, DTensor) is divided] for divided in (True, False)]
    norms = [full_tensor(get_total_norm([p.grad for p in some if p.grad is not None])) for some in kinds if some]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for some in kinds:
        clip_grads_with_norm_(some, math.inf if limit is None else limit, norm)
    return norm
