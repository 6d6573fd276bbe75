"""Towers divided among processes (FSDP2): of W each holds 1/W of the encoders' weights, gradients and optimizer state.

`fully_shard` (Zhao et al., arXiv 2304.11277; torch.distributed.fsdp) gathers the weights of a layer when it is used and
frees them after; in backward it leaves each process its part of the gradients' mean. What stands beside the encoders
(projections, logit_scale) is whole everywhere. Gathering is collective: all processes run as many micro-batches through
the same towers in the same order (`TrainStep`), and read and write whole tensors together.

Each micro-batch sends the weights once for each run of it forward and once backward, 2 or 4 bytes each, and its
gradients once, 4 bytes each: so few large micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from retriever.device import Precision
from retriever.model_folder import layers_of

if TYPE_CHECKING:
    from retriever.towers import Towers


def shard_encoders(towers: Towers, precision: Precision, device: torch.device, processes: int) -> None:
    """Divide the encoders' weights, on the CPU yet and the same in all processes, and move this one's part to `device`.

    On a GPU bf16 means that weights are gathered, and activations kept, in bf16; gradients are summed in fp32.
    """
    mesh = init_device_mesh(device.type, (processes,))
    half = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None
    policy = MixedPrecisionPolicy(half, half and torch.float32)
    for encoder in towers.encoders:
        for module in (*layers_of(encoder), encoder):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # sentence-transformers calls an encoder's methods by name, past the hooks that gather and free.
    methods = {(t.auto_model, about["method"]) for t in towers.transformers for about in t.modality_config.values()}
    for encoder, method in methods:
        register_fsdp_forward_method(encoder, method)


def is_sharded(towers: Towers) -> bool:
    """Whether `shard_encoders` has divided them."""
    return any(isinstance(encoder, FSDPModule) for encoder in towers.encoders)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors where they are to be kept, nothing elsewhere; what was divided is on the host. All processes call
    it."""
    found = {}
    for name, tensor in tensors.items():
        # One after another: the device has room for one.
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
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
    norms = [whole(get_total_norm([p.grad for p in some if p.grad is not None])) for some in kinds if some]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for some in kinds:
        clip_grads_with_norm_(some, math.inf if limit is None else limit, norm)
    return norm
