"""Micro-batch sizes, and the number of autograd graphs kept until the loss, chosen from free memory."""

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

from retriever.models.fsdp import encoding_mode, is_sharded
from retriever.models.mixed_precision import mixed_precision
from retriever.models.sharded_tensors import local_part
from retriever.models.towers import Towers
from retriever.utils.device import Precision
from retriever.utils.torchrun import local_world_size

# Tokens of a micro-batch on a CPU. With MiniLM on two cores, 1536 to 6144 tokens are equally fast.
CPU_TOKENS = 4096
# Fraction of the free host memory that graphs may take.
_CPU_SHARE = 0.25
# Range of micro-batch sizes on a GPU, in tokens. Smaller ones leave it idle, larger ones are not faster
# (scripts/benchmarks/retriever/bench_train.py).
MIN_TOKENS, MAX_TOKENS = 4096, 131072

# Bytes per element of an embedding while the loss is computed: the leaf, the reordered copy, the copy in the precision
# of the products, the sum of gradients, and the gradient of the leaf. With offloading only the copy and the sum.
LOSS_BYTES, LOSS_BYTES_OFFLOADED = 20, 14

_PROBE_TOKENS, _PROBE_LENGTH = 8192, 128
# Length of the texts with which encoding is measured: attention may take memory quadratic in the length.
_LONG_PROBE = 512
# Additional memory of a graph during its backward, relative to the graph, and the fraction of the GPU that is reserved
# for fragmentation of the allocator.
_BACKWARD, _SLACK = 0.25, 0.08
MAX_CAPTURED_TOKENS = 32768
"""Largest micro-batch that runs as a CUDA graph. With more tokens the GPU computes for longer than the host needs to
launch the kernels."""
# Bytes per parameter of the gradients that a captured backward holds at once.
_CAPTURED_BYTES = 2
# Upper bound in bytes per parameter: gradient, optimizer moments and half-precision copy.
_PARAMETER_BYTES = 14


@dataclass(frozen=True)
class GraphMemory:
    """Micro-batch size of training, and the number of tokens whose autograd graphs fit into memory."""

    micro_batch_tokens: int
    """Largest number of tokens in a micro-batch."""
    graph_tokens: int
    """Number of tokens, over all micro-batches, whose graphs fit into the remaining memory."""

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
        cuda_graphs: bool | None = False,
        reserved: int = 0,
    ) -> GraphMemory:
        """Measure the memory of a small micro-batch and divide the free memory. On a CPU the size is fixed.

        Args:
            towers: Towers in training mode, on their device.
            precision: Precision of the towers.
            texts: Number of queries and passages in a batch, whose embeddings and gradients also take memory.
            workspace_mib: Workspace of the loss in MiB.
            micro_batch_tokens: Tokens of a micro-batch. None: chosen here.
            offload_embeddings: Whether embeddings are on the device only while the loss is computed. Default: False.
            cuda_graphs: Whether micro-batches run as CUDA graphs, whose memory is not shared with other passes; None
                if they do when all are small enough. Default: False.
            reserved: Bytes of the device that will be taken before the first step. Default: 0.
        """
        device = towers.device
        if device.type != "cuda":
            tokens = micro_batch_tokens or CPU_TOKENS
            # The saved tensors of sharded towers cannot be measured on a CPU.
            if is_sharded(towers):
                return cls(tokens, tokens)
            room = max(0, _CPU_SHARE * (available_bytes() - reserved))
            return cls(tokens, max(tokens, int(room / max(1, graph_bytes(towers, precision)))))
        token_bytes = graph_bytes(towers, precision)
        free, total = _free_bytes(device)
        parameters = sum(local_part(p).numel() for p in towers.parameters() if p.requires_grad)
        embeddings = texts * towers.dimension * (LOSS_BYTES_OFFLOADED if offload_embeddings else LOSS_BYTES)
        room = free - reserved - _SLACK * total - parameters * _PARAMETER_BYTES - embeddings - workspace_mib * 2**20
        fitting = max(room, 0) / token_bytes
        tokens = micro_batch_tokens or fitting_tokens(fitting)
        captured = 0.0
        if cuda_graphs or (cuda_graphs is None and tokens <= MAX_CAPTURED_TOKENS):
            captured = (1 + _BACKWARD) * min(tokens, MAX_CAPTURED_TOKENS) + parameters * _CAPTURED_BYTES / token_bytes
        return cls(tokens, max(0, int(fitting - _BACKWARD * tokens - captured)))

    def kept(self, sizes: list[int]) -> int:
        """Return how many of the last micro-batches keep their graphs until the loss is computed.

        Args:
            sizes: Tokens of each micro-batch, in order.
        """
        if sum(sizes) <= self.graph_tokens:
            return len(sizes)
        # Micro-batches that run twice do so after the backward of the kept graphs, so their memory is not added.
        return int(np.searchsorted(np.cumsum(sizes[::-1]), self.graph_tokens, side="right"))

    def describe(self, sizes: list[int]) -> str:
        """Return a line that describes the result of `kept` for a step."""
        kept = self.kept(sizes)
        return (
            f"{sum(sizes):,} tokens a step in {len(sizes)} micro-batches of at most {max(sizes):,}: "
            f"{kept} keep their graph until the loss, {len(sizes) - kept} run twice"
        )


def fitting_tokens(graph_tokens: float) -> int:
    """Return the micro-batch size, in tokens, with which at least two full micro-batches fill the memory.

    Args:
        graph_tokens: Tokens whose graphs fit into memory, before what one backward needs in addition.
    """
    count = max(2, math.ceil(graph_tokens / MAX_TOKENS - _BACKWARD))
    tokens = int(np.clip(graph_tokens / (count + _BACKWARD), MIN_TOKENS, MAX_TOKENS))
    return tokens // 1024 * 1024


def default_encode_tokens(device: torch.device) -> int:
    """Return the default number of tokens of a micro-batch without autograd graph, if memory allows."""
    return CPU_TOKENS if device.type != "cuda" else 262144


@dataclass(frozen=True)
class EncodeMemory:
    """Micro-batch size of encoding, and its peak memory."""

    micro_batch_tokens: int
    """Largest number of tokens in a micro-batch."""
    peak: float
    """Expected peak of GPU memory in bytes, weights included; 0 on a CPU."""

    @classmethod
    def plan(cls, towers: Towers, *, texts: int, micro_batch_tokens: int | None = None) -> EncodeMemory:
        """Measure the memory of a small micro-batch and divide the free memory. On a CPU the size is fixed.

        On a GPU this resets torch's peak memory statistics.

        Args:
            towers: Towers in evaluation mode, on their device, inside their `mixed_precision` context.
            texts: Number of texts whose embeddings are on the device at the same time.
            micro_batch_tokens: Tokens of a micro-batch. None: chosen here.
        """
        device = towers.device
        if device.type != "cuda":
            return cls(micro_batch_tokens or CPU_TOKENS, 0.0)
        token_bytes = _forward_bytes(towers)
        free, total = _free_bytes(device)
        # The embeddings of a window are copied to the host while those of the next one are computed.
        embeddings = 2 * 4 * texts * towers.dimension
        fitting = int((free - _SLACK * total - embeddings) / token_bytes)
        tokens = micro_batch_tokens or min(max(fitting, MIN_TOKENS), default_encode_tokens(device))
        return cls(tokens, torch.cuda.memory_allocated(device) + embeddings + tokens * token_bytes)


def graph_bytes(towers: Towers, precision: Precision) -> float:
    """Measure the bytes per token that an autograd graph holds until backward, in the tower where it holds most."""
    on_gpu = towers.device.type == "cuda"
    # On a CPU an overestimate costs some speed, an underestimate may end the run; hence the long texts.
    probes = (
        towers.memory_probes(_PROBE_TOKENS, _PROBE_LENGTH) if on_gpu else towers.memory_probes(_LONG_PROBE, _LONG_PROBE)
    )
    return max(measure_graph_bytes(towers, precision, embed) / number for number, embed in probes)


def measure_graph_bytes(towers: Towers, precision: Precision, forward: Callable[[], Tensor]) -> float:
    """Measure the bytes that the autograd graph of `forward` holds until backward."""
    device = towers.device
    if device.type == "cuda":
        with torch.random.fork_rng(devices=[device]), mixed_precision(towers, precision):
            before = torch.cuda.memory_allocated(device)
            output = forward()
            allocated = torch.cuda.memory_allocated(device) - before
            del output
        return float(allocated)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*towers.parameters(), *towers.buffers())}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), mixed_precision(towers, precision), hooks:
        output = forward()
    del output
    return float(sum(storages.values()))


def _forward_bytes(towers: Towers) -> float:
    """Measure the peak bytes per token of a forward pass without graph, in the tower where it is largest."""
    device, largest = towers.device, 0.0
    with encoding_mode(towers):
        for tokens, embed in towers.memory_probes(_PROBE_TOKENS, _LONG_PROBE):
            # The first forward also allocates persistent workspaces of the matrix products.
            embed()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            embed()
            largest = max(largest, (torch.cuda.max_memory_allocated(device) - before) / tokens)
    return largest


def available_bytes() -> int:
    """Return this process's share of the free memory of the host or of its container, in bytes.

    The free memory is divided by the number of processes of this run on the host.
    """
    room = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        folder = Path("/sys/fs/cgroup", "" if limit == "memory.max" else "memory")
        # There is no limit if the file is missing or contains "max".
        with contextlib.suppress(OSError, ValueError):
            room = min(room, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, room) // local_world_size()


def _free_bytes(device: torch.device) -> tuple[int, int]:
    """Return the bytes that torch's allocator can still provide on a GPU, and the GPU's total memory."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
