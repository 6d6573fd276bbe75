"""How much passes through the towers at once, and how many graphs of it may wait for the loss: from free memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from retriever.models.fsdp import is_sharded
from retriever.models.mixed_precision import arithmetic
from retriever.models.sharded_tensors import own_part
from retriever.models.towers import Towers
from retriever.utils.device import Precision
from retriever.utils.torchrun import local_world_size

# Measured with MiniLM on two cores: 1536 to 6144 tokens are equally fast.
CPU_TOKENS = 4096
# Of the memory that a CPU's programs may still take, for graphs: others want some too.
_CPU_SHARE = 0.25
# On a GPU, as many as memory has room for, within these: fewer starve it, more gain nothing (scripts/bench_train.py).
LEAST_TOKENS, MOST_TOKENS = 4096, 131072

# Bytes for each number of an embedding while the loss is computed: as a leaf, in order, in the products' precision,
# sums of its gradient, and this on its way to the leaf. What waits on the host is there in order, and as sums.
AT_LOSS, AT_LOSS_OFFLOADED = 20, 14

_PROBE_TOKENS, _PROBE_LENGTH = 8192, 128
# Where attention takes memory for each pair of tokens, long texts take most; encoding is measured with such.
_LONG_PROBE = 512
# What a graph in its backward needs beside itself, and how much of the GPU is never planned for: the allocator's gaps.
_BACKWARD, _SLACK = 0.25, 0.08
# Gradients, optimizer moments and the half-precision copy, bytes a parameter, at most.
_PARAMETER_BYTES = 14


@dataclass(frozen=True)
class GraphMemory:
    """The memory that graphs of the towers take, and how much of it there is."""

    micro_batch_tokens: int
    """Most tokens of a micro-batch."""
    graph_tokens: int
    """Tokens whose graphs fit beside everything else, over all micro-batches."""

    @classmethod
    def plan(
        cls,
        towers: Towers,
        precision: Precision,
        *,
        texts: int,
        workspace_mib: int,
        micro_batch_tokens: int | None,
        offload_embeddings: bool = False,
    ) -> GraphMemory:
        """Measure a small micro-batch and divide what is free; on a CPU micro-batches are of a fixed size.

        Args:
            towers: in training mode, on their device.
            precision: of the towers.
            texts: queries and passages of a batch, whose embeddings and gradients wait too.
            workspace_mib: of the loss.
            micro_batch_tokens: tokens of a micro-batch if they are given.
            offload_embeddings: embeddings are on the device only while the loss is computed.
        """
        device = towers.device
        if device.type != "cuda":
            tokens = micro_batch_tokens or CPU_TOKENS
            # Divided towers, which are for GPUs, do not show what their graphs hold.
            if is_sharded(towers):
                return cls(tokens, tokens)
            room = _CPU_SHARE * available_bytes()
            return cls(tokens, max(tokens, int(room / max(1, graph_bytes(towers, precision)))))
        token_bytes = graph_bytes(towers, precision)
        free, total = _free_bytes(device)
        parameters = sum(own_part(p).numel() for p in towers.parameters() if p.requires_grad)
        embeddings = texts * towers.dimension * (AT_LOSS_OFFLOADED if offload_embeddings else AT_LOSS)
        room = free - _SLACK * total - parameters * _PARAMETER_BYTES - embeddings - workspace_mib * 2**20
        most = max(room, 0) / token_bytes
        tokens = micro_batch_tokens or fitting_tokens(most)
        return cls(tokens, max(0, int(most - _BACKWARD * tokens)))

    def keep(self, sizes: list[int]) -> int:
        """How many micro-batches of so many tokens, the last ones, may keep their graphs until the loss is known."""
        if sum(sizes) <= self.graph_tokens:
            return len(sizes)
        # One of those that run again has its graph beside the loss's results, but no longer beside the kept ones.
        return int(np.searchsorted(np.cumsum(sizes[::-1]), self.graph_tokens, side="right"))

    def described(self, sizes: list[int]) -> str:
        """What `keep` chose for a step, for a person to read."""
        kept = self.keep(sizes)
        return (
            f"{sum(sizes):,} tokens a step in {len(sizes)} micro-batches of at most {max(sizes):,}: "
            f"{kept} keep their graph until the loss, {len(sizes) - kept} run twice"
        )


def fitting_tokens(most: float) -> int:
    """Tokens of a micro-batch, so that whole ones, two at least, fill memory for `most` tokens' graphs.

    Beside the graphs that are kept lies what the backward of one needs.
    """
    count = max(2, math.ceil(most / MOST_TOKENS - _BACKWARD))
    tokens = int(np.clip(most / (count + _BACKWARD), LEAST_TOKENS, MOST_TOKENS))
    return tokens // 1024 * 1024


def encode_tokens(device: torch.device) -> int:
    """Tokens that pass through a tower at once where no graph is kept, if nothing else is asked for and they fit."""
    return CPU_TOKENS if device.type != "cuda" else 262144


@dataclass(frozen=True)
class EncodeMemory:
    """How much passes through a tower at once where no graph is kept, and the memory that this takes."""

    micro_batch_tokens: int
    """Most tokens of a micro-batch."""
    peak: float
    """Bytes of torch's allocator on a GPU at the height of it, weights included; 0 on a CPU."""

    @classmethod
    def plan(cls, towers: Towers, *, texts: int, micro_batch_tokens: int | None = None) -> EncodeMemory:
        """Measure small micro-batches on a GPU and divide what is free; on a CPU take a fixed size.

        On a GPU torch's record of the most memory used begins anew.

        Args:
            towers: in evaluation mode, on their device, within their `arithmetic`.
            texts: whose embeddings are on the device at once.
            micro_batch_tokens: tokens of a micro-batch if they are given.
        """
        device = towers.device
        if device.type != "cuda":
            return cls(micro_batch_tokens or CPU_TOKENS, 0.0)
        token_bytes = _forward_bytes(towers)
        free, total = _free_bytes(device)
        # One window's leave while the next one's come.
        embeddings = 2 * 4 * texts * towers.dimension
        most = int((free - _SLACK * total - embeddings) / token_bytes)
        tokens = micro_batch_tokens or min(max(most, LEAST_TOKENS), encode_tokens(device))
        return cls(tokens, torch.cuda.memory_allocated(device) + embeddings + tokens * token_bytes)


def graph_bytes(towers: Towers, precision: Precision) -> float:
    """Bytes that one token's graph holds until its backward, in the tower where it holds most; measured."""
    on_gpu = towers.device.type == "cuda"
    # Too much planned for costs a CPU some speed, too little the run.
    probes = towers.probes(_PROBE_TOKENS, _PROBE_LENGTH) if on_gpu else towers.probes(_LONG_PROBE, _LONG_PROBE)
    return max(held_bytes(towers, precision, embed) / number for number, embed in probes)


def held_bytes(towers: Towers, precision: Precision, forward: Callable[[], Tensor]) -> float:
    """Bytes that the graph of a forward holds until its backward."""
    device = towers.device
    if device.type == "cuda":
        with torch.random.fork_rng(devices=[device]), arithmetic(towers, precision):
            before = torch.cuda.memory_allocated(device)
            output = forward()
            held = torch.cuda.memory_allocated(device) - before
            del output
        return float(held)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*towers.parameters(), *towers.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), arithmetic(towers, precision), hooks:
        output = forward()
    del output
    return float(sum(storages.values()))


def _forward_bytes(towers: Towers) -> float:
    """Bytes a token that a forward without graph takes at its height, in the tower where it takes most."""
    device, most = towers.device, 0.0
    with torch.inference_mode():
        for tokens, embed in towers.probes(_PROBE_TOKENS, _LONG_PROBE):
            # The first forward also allocates what stays: workspaces of the matrix products.
            embed()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            embed()
            most = max(most, (torch.cuda.max_memory_allocated(device) - before) / tokens)
    return most


def available_bytes() -> int:
    """Memory of the host that this process may still take: its part of the machine's, or of its container's."""
    room = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        folder = Path("/sys/fs/cgroup", "" if limit == "memory.max" else "memory")
        # Where there is no such file, or no number in it ("max"), nothing is limited.
        with contextlib.suppress(OSError, ValueError):
            room = min(room, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, room) // local_world_size()


def _free_bytes(device: torch.device) -> tuple[int, int]:
    """What torch's allocator may still give out on a GPU, and the GPU's whole memory."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
