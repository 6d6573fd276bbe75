"""Towers divided among processes (FSDP2): of W each holds 1/W of the encoders' weights, gradients and optimizer state.

`fully_shard` (Zhao et al., arXiv 2304.11277; torch.distributed.fsdp) gathers the weights of a layer when it is used and
frees them after; in backward it leaves each process its part of the gradients' mean. What stands beside the encoders
(projections, logit_scale) is whole everywhere. Gathering is collective: all processes run as many micro-batches through
the same towers in the same order (`TrainStep`), and read and write whole tensors together.

Each micro-batch sends the weights once for each run of it forward and once backward, 2 or 4 bytes each, and its
gradients once, 4 bytes each: so few large micro-batches.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from retriever.models.loading.folder import transformer_layers
from retriever.models.towers import Towers
from retriever.utils.device import Precision


def shard_encoders(towers: Towers, precision: Precision, device: torch.device, processes: int) -> None:
    """Divide the encoders' weights, on the CPU yet and the same in all processes, and move this one's part to `device`.

    On a GPU bf16 means that weights are gathered, and activations kept, in bf16; gradients are summed in fp32.
    """
    mesh = init_device_mesh(device.type, (processes,))
    half = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None
    policy = MixedPrecisionPolicy(half, half and torch.float32)
    for encoder in towers.encoders:
        for module in (*transformer_layers(encoder), encoder):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # sentence-transformers calls an encoder's methods by name, past the hooks that gather and free.
    methods = {(t.auto_model, about["method"]) for t in towers.transformers for about in t.modality_config.values()}
    for encoder, method in methods:
        register_fsdp_forward_method(encoder, method)


def is_sharded(towers: Towers) -> bool:
    """Whether `shard_encoders` has divided them."""
    return any(isinstance(encoder, FSDPModule) for encoder in towers.encoders)
