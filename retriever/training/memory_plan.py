"""Plan the memory that a training step needs on each process, without training: `retriever train --dry-run`.

Weights, gradients and optimizer state are counted. The graph of a micro-batch is measured by running one forward. Other
allocations are computed from their shapes. The peak of a step is the largest of four moments: the loss, when all
embeddings and their gradients are in memory; the backward of the kept graphs, newest first; the backward of a
recomputed micro-batch, when all gradients are in memory; and the optimizer's update of the largest parameter. On a CPU,
the copies from which a checkpoint is written are a fifth moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from losses.torch_tiles.tiles import CPU_TILE_ENTRIES
from retriever.config.run import TrainConfig
from retriever.data.micro_batches import PreparedBatch
from retriever.models.loading.folder import transformer_layers
from retriever.models.memory import (
    LOSS_BYTES,
    LOSS_BYTES_OFFLOADED,
    MAX_CAPTURED_TOKENS,
    GraphMemory,
    measure_graph_bytes,
)
from retriever.models.towers import Towers
from retriever.training.cuda_graphs import captured_size, uses_cuda_graphs
from retriever.training.objective.further_memory import FurtherMemory
from retriever.utils.device import Precision

MIB = 2**20
# Bytes per number of an embedding after the loss: the leaf and its gradient, in float32.
_AFTER_LOSS = 8
# Workspace of cuBLAS on a Hopper GPU, for the threads of forward and backward.
_LIBRARY_BYTES = 64 * MIB
# Additional memory of a backward, as a fraction of its graph: at its peak, and before the first gradient of a weight.
_BACKWARD, _BACKWARD_START = 0.25, 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one process in bytes: of its GPU if it has one, otherwise of the host."""

    resident: dict[str, float]
    """Purpose -> bytes in use throughout the run."""
    step: dict[str, float]
    """Purpose -> bytes in use during a part of each step."""
    peak: float
    """Largest number of bytes in use at any time."""
    available: float
    """Bytes that the GPU of this process, or the machine, has in all."""
    host: dict[str, float]
    """Purpose -> bytes on the host, if `resident` and `step` are on a GPU."""
    notes: list[str]
    """Lines that describe the step."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the available memory."""
        return self.peak <= self.available

    def lines(self) -> list[str]:
        """Format the plan for the terminal."""
        rows = [*self.resident.items(), *self.step.items(), ("peak", self.peak), ("of", self.available)]
        device = [f"  {name:<58}{size / MIB:>12,.0f} MiB" for name, size in rows]
        host = [f"  {name + ' (host)':<58}{size / MIB:>12,.0f} MiB" for name, size in self.host.items()]
        return [*self.notes, *device, *host]


def plan_step(
    config: TrainConfig,
    towers: Towers,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    graphs: GraphMemory,
    batch: PreparedBatch,
    *,
    precision: Precision,
    ranks: int,
    batches_waiting: int,
    further: FurtherMemory | None = None,
) -> MemoryPlan:
    """Plan the memory of the steps of a run.

    Args:
        config: the configuration of the run.
        towers: the towers on their device.
        loss: the loss module.
        optimizer: the optimizer, which has not made a step.
        graphs: how many graphs are kept.
        batch: this process's share of the largest batch.
        precision: precision of the towers.
        ranks: number of processes.
        batches_waiting: number of prepared batches in host memory.
        further: memory of guide, teacher and frozen passages. Default: none.
    """
    further = further or FurtherMemory()
    device = towers.device
    on_gpu = device.type == "cuda"
    # Read first, because memory used by a forward stays with the process.
    process_bytes = 0.0 if on_gpu else float(psutil.Process().memory_info().rss)
    rows, width = sum(len(group) for group in batch.groups), towers.dimension
    passages = rows - batch.queries
    sizes = batch.micro_batch_tokens
    kept = graphs.kept(sizes)
    graph_sizes = _graph_bytes(towers, precision, batch)
    with_graphs = uses_cuda_graphs(config, towers, precision, sizes)
    if with_graphs:
        rounded = [captured_size(size) for size in sizes]
        graph_sizes = [
            graph * (large / size if large <= MAX_CAPTURED_TOKENS else 1)
            for graph, size, large in zip(graph_sizes, sizes, rounded, strict=True)
        ]
    recomputed_sizes, kept_sizes = graph_sizes[: len(sizes) - kept], graph_sizes[len(sizes) - kept :]
    kept_graphs, recomputed_graph = sum(kept_sizes), max(recomputed_sizes, default=0.0)

    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharding = _Sharding.of(ranks, towers) if config.shard_towers else _Sharding(1, frozenset())
    gradients = sharding.bytes_of(trained)
    tensors = [t for module in (towers, loss) for t in (*module.parameters(), *module.buffers())]
    resident = {
        "weights": sharding.bytes_of(tensors),
        f"optimizer ({config.optim.name})": sharding.sum(trained, lambda p: _moment_bytes(p, config.optim.name)),
    }
    if config.optim.ema is not None:
        resident["average of the weights"] = sharding.bytes_of(p for p in towers.parameters() if p.requires_grad)
    # safetensors serializes copies. The larger file is the optimizer's, and it is written unsharded.
    checkpoint = 2 * max(resident.values()) * sharding.processes
    resident |= further.resident
    if on_gpu:
        resident["workspace of cuBLAS"] = float(_LIBRARY_BYTES)
    else:
        resident["program, libraries, open data"] = max(
            0.0, process_bytes - sum(tensor.nbytes for tensor in tensors) - sum(further.resident.values())
        )
    bf16_weights = 0.0
    if on_gpu and precision == "bf16" and sharding.processes == 1:
        copied = (p for encoder in towers.encoders for p in encoder.parameters() if p.dtype == torch.float32)
        bf16_weights = 2.0 * sum(p.numel() for p in copied)
    # CUDA graphs keep their accumulated gradients, and a captured backward holds all its gradients in bf16 at once.
    uses_graphs = with_graphs and captured_size(min(sizes)) <= MAX_CAPTURED_TOKENS
    accumulated, captured = (gradients, bf16_weights) if uses_graphs else (0.0, 0.0)
    offloaded = on_gpu and config.offload_embeddings
    at_loss, after_loss = (LOSS_BYTES_OFFLOADED, 0) if offloaded else (LOSS_BYTES, _AFTER_LOSS)
    workspace = _loss_workspace(config, batch.queries, passages, width, on_gpu, ranks)
    gathered = sharding.gathered_bytes(towers, 2 if on_gpu and precision == "bf16" else 4)
    exchanged = _exchange_bytes(passages, width, ranks, config)
    step = {
        "weights in bf16": bf16_weights,
        "gradients of CUDA graphs": captured,
        "layers gathered from all processes": gathered,
        "gradients": gradients,
        f"graphs kept until the loss ({kept} of {len(sizes)} micro-batches)": kept_graphs,
        "graph of one micro-batch, and its backward": (1 + _BACKWARD) * max(graph_sizes),
        "embeddings and their gradients": float(at_loss * rows * width),
        "workspace of the loss": workspace,
        "passages exchanged between processes": exchanged,
        **further.step,
    }
    # With several micro-batches, a new gradient exists in full before it is added to the accumulated one.
    new_gradient = max(sharding.bytes_of([parameter]) for parameter in trained) if len(sizes) > 1 else 0.0
    backward_start = gradients + new_gradient + _BACKWARD * max(kept_sizes, default=0.0)
    if on_gpu and len(sizes) == 1:
        # A single graph is freed while its gradients are made. The allocator of a CPU does not reuse its memory.
        backward_start = _BACKWARD_START * kept_graphs + accumulated
    moments = [
        kept_graphs + accumulated + at_loss * rows * width + workspace + exchanged + sum(further.step.values()),
        kept_graphs + backward_start + after_loss * rows * width,
        gradients + new_gradient + (1 + _BACKWARD) * recomputed_graph + after_loss * rows * width,
        gradients + max(map(partial(_update_bytes, name=config.optim.name), trained)),
    ]
    data = float(batches_waiting * batch_bytes(batch))
    if not on_gpu:
        resident["prepared batches"] = data
        step["a checkpoint while it is written"] = checkpoint
        moments.append(checkpoint)
    host = {
        "prepared batches": data,
        "embeddings and their gradients": 8.0 * rows * width if offloaded else 0.0,
        "a checkpoint while it is written": checkpoint,
        **further.host,
    }
    return MemoryPlan(
        {name: size for name, size in resident.items() if size},
        {name: size for name, size in step.items() if size},
        sum(resident.values()) + bf16_weights + captured + gathered + max(moments),
        float(torch.cuda.mem_get_info(device)[1]) if on_gpu else float(psutil.virtual_memory().total),
        {name: size for name, size in host.items() if size} if on_gpu else {},
        [
            f"each of {ranks} processes, {device.type}, {precision}: {batch.queries:,} queries and {passages:,} "
            f"passages a step, {batch.tokens:,} tokens in {len(sizes)} micro-batches of at most {max(sizes):,}",
            *further.notes,
        ],
    )


def batch_bytes(batch: PreparedBatch) -> int:
    """Return the bytes of a prepared batch on the host: token ids or pixels, and the masks of false negatives."""
    masks = batch.false_negatives
    size = 0 if masks is None else masks.query_ids.nbytes + masks.passage_ids.nbytes + masks.excluded.nbytes
    return size + sum(group.nbytes for group in batch.groups)


@dataclass(frozen=True)
class _Sharding:
    """How the encoders are sharded over processes (models/fsdp.py); `processes` is 1 if they are not."""

    processes: int
    parameters: frozenset[Tensor]
    """The sharded parameters."""

    @classmethod
    def of(cls, processes: int, towers: Towers) -> _Sharding:
        return cls(processes, frozenset(p for encoder in towers.encoders for p in encoder.parameters()))

    def sum(self, tensors: Iterable[Tensor], size: Callable[[Tensor], float]) -> float:
        """Sum the sizes of what one process holds of the tensors."""
        return float(sum(size(t) / (self.processes if t in self.parameters else 1) for t in tensors))

    def bytes_of(self, tensors: Iterable[Tensor]) -> float:
        return self.sum(tensors, lambda tensor: tensor.nbytes)

    def gathered_bytes(self, towers: Towers, number_bytes: int) -> float:
        """Return the bytes of gathered parameters in backward: two layers, the float32 gradient of one, and the
        parameters outside layers with their gradients."""
        if self.processes == 1:
            return 0.0
        largest = 0.0
        for encoder in towers.encoders:
            layers = [sum(p.numel() for p in layer.parameters()) for layer in transformer_layers(encoder)]
            outside = sum(p.numel() for p in encoder.parameters()) - sum(layers)
            largest = max(largest, (2 * number_bytes + 4) * max(layers) + (number_bytes + 4) * outside)
        return largest


def _graph_bytes(towers: Towers, precision: Precision, batch: PreparedBatch) -> list[float]:
    """Return the bytes of the graph of each micro-batch.

    The largest micro-batch of each group is measured and the others are scaled by their tokens. Groups differ: a token
    of an image holds more than one of a text, and cached features of a frozen tower hold almost nothing.
    """
    sizes, estimates = batch.micro_batch_tokens, list[float]()
    for group in batch.groups:
        group_sizes = sizes[len(estimates) : len(estimates) + len(group.micro_batches)]
        if group_sizes:
            largest = int(np.argmax(group_sizes))
            measured = measure_graph_bytes(
                towers, precision, partial(group.embed, towers, group.micro_batches[largest])
            )
            estimates += [measured * size / max(1, group_sizes[largest]) for size in group_sizes]
    return estimates


def _moment_bytes(parameter: Tensor, name: str) -> float:
    """Return the bytes of the optimizer state of a parameter (optim.py)."""
    if name == "adamw":
        return 2.0 * parameter.nbytes
    first, numel = parameter.shape[0] if parameter.ndim else 1, parameter.numel()
    rows, columns = first, numel // max(1, first)
    factored = parameter.ndim > 1 and min(rows, columns) >= 32
    return 2.0 * numel + 4.0 * ((rows + columns) if factored else numel)


def _update_bytes(parameter: Tensor, name: str) -> float:
    """Return the temporary bytes of updating a parameter: a float32 tensor in Adafactor, none in fused AdamW."""
    return 4.0 * parameter.numel() if name == "adafactor" else 0.0


def _loss_workspace(config: TrainConfig, queries: int, passages: int, width: int, on_gpu: bool, ranks: int) -> float:
    """Return the bytes of the tiles of the score matrix, or of several full matrices if the loss stores it."""
    scores, limit = float(queries) * passages, float(config.loss.workspace_mib * MIB)
    if config.loss.name == "clip" or config.loss.implementation in ("full", "dense"):
        return 20 * scores * ranks**2
    if on_gpu:
        return min(limit, 16 * scores)
    return min(limit, 13 * min(scores, CPU_TILE_ENTRIES) + 24.0 * width * CPU_TILE_ENTRIES**0.5)


def _exchange_bytes(passages: int, width: int, ranks: int, config: TrainConfig) -> float:
    """Return the bytes of blocks in the ring, two in transfer and three sums (losses/distributed/ring.py), or of the
    gathered pool."""
    if ranks == 1:
        return 0.0
    ring = passages * width * (2 * 4 + 3 * 4)
    pool = ranks * passages * width * 8
    return float(pool if ranks == 2 or pool <= config.loss.workspace_mib * MIB else ring)
