"""Towers sharded by FSDP2: each of W processes holds 1/W of the encoders' weights, gradients and optimizer state.

`fully_shard` (Zhao et al., arXiv 2304.11277; torch.distributed.fsdp) gathers the weights of a layer before it is used
and frees them afterwards. Backward leaves each process its shard of the mean gradient. Modules outside the encoders
(projections, logit_scale) are replicated. Gathering is a collective, so all processes must run the same number of
micro-batches through the same towers in the same order (`TrainStep`).

Communication per micro-batch: the weights for each forward and for backward, 2 or 4 bytes each, and the gradients once,
4 bytes each. Few large micro-batches are therefore best.
"""

from __future__ import annotations

import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from retriever.models.loading.folder import transformer_layers
from retriever.models.towers import Towers
from retriever.utils.device import Precision


def shard_encoders(towers: Towers, precision: Precision, device: torch.device, processes: int) -> None:
    """Shard the encoders' weights over all processes and move this process's shard to `device`.

    Args:
        towers: Towers on the CPU, with the same weights in all processes. Changed in place.
        precision: With "bf16" on a GPU, weights are gathered and activations computed in bf16; gradients are summed
            in fp32.
        device: Device of the shard.
        processes: Number of processes, W.
    """
    mesh = init_device_mesh(device.type, (processes,))
    gathered_dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None
    policy = MixedPrecisionPolicy(gathered_dtype, gathered_dtype and torch.float32)
    for encoder in towers.encoders:
        for module in (*transformer_layers(encoder), encoder):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # sentence-transformers calls an encoder's methods by name, which bypasses the hooks that gather and free weights.
    methods = {
        (transformer.auto_model, modality["method"])
        for transformer in towers.transformers
        for modality in transformer.modality_config.values()
    }
    for encoder, method in methods:
        register_fsdp_forward_method(encoder, method)


def is_sharded(towers: Towers) -> bool:
    """Whether `shard_encoders` has sharded these towers."""
    return any(isinstance(encoder, FSDPModule) for encoder in towers.encoders)


def encoding_mode(towers: Towers) -> contextlib.AbstractContextManager[object]:
    """Return the context in which towers encode: inference mode, and for sharded towers without gradients.

    FSDP keeps the memory that it gathers the weights into. Memory from inference mode could not be used in training.
    """
    return torch.no_grad() if is_sharded(towers) else torch.inference_mode()
