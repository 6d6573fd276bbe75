"""Operations on tensors that may be sharded over processes (see fsdp.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor. A collective if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather full tensors. A collective: all processes must call it.

    Args:
        tensors: Name -> tensor, sharded or not.
        keep: Whether this process needs the result.

    Returns:
        Name -> full tensor if `keep`, otherwise an empty dictionary. Tensors that were sharded are on the CPU.
    """
    gathered = {}
    for name, tensor in tensors.items():
        # One at a time, to limit the memory on the device.
        full = full_tensor(tensor.detach())
        if keep:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Shard a full tensor, equal in all processes, in the way `example` is sharded."""
    if not isinstance(example, DTensor) or tensor.shape != example.shape:
        return tensor
    # Every process has the full tensor, so nothing is sent.
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients so that their total L2 norm is at most `limit`, in place.

    Equals `torch.nn.utils.clip_grad_norm_`, which does not accept a mix of sharded and other parameters.

    Args:
        parameters: At least one must have a gradient.
        limit: Largest norm. None: gradients are not changed.

    Returns:
        0-dim tensor: the norm before clipping, over the full gradients.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    groups = [[p for p in with_gradient if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    norms = [full_tensor(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups if group]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        clip_grads_with_norm_(group, math.inf if limit is None else limit, norm)
    return norm
