"""What a step of training will need on each process, before any is made: `retriever train --dry-run`.

Weights, gradients and optimizer are counted, the graph of a micro-batch is measured by running one forward, and what
else a step allocates is counted from its shapes. A step's peak is the largest of four moments: the loss, when all
embeddings and their gradients are there; the backward of the kept graphs, newest first; the backward of a micro-batch
that runs again, beside all gradients; and the optimizer's update of the largest parameter. A checkpoint is written from
copies on the host, which may be the fifth on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from losses.torch_tiles.tiles import CPU_TILE_ENTRIES
from retriever.config.run import TrainConfig
from retriever.data.micro_batches import PreparedBatch
from retriever.models.loading.folder import layers_of
from retriever.models.memory import AT_LOSS, AT_LOSS_OFFLOADED, GraphMemory, held_bytes
from retriever.models.towers import Towers
from retriever.training.cuda_graphs import MAX_TOKENS, captured_size
from retriever.utils.device import Precision

MIB = 2**20
# Of each number of an embedding after the loss: the leaf and its gradient.
_AFTER_LOSS = 8
# What cuBLAS takes for itself on a Hopper, for each of the threads of forward and backward.
_OF_LIBRARY = 64 * MIB
# What a backward pass holds beside its graph, as part of it; and before it has made any gradient of a weight.
_BACKWARD, _BEGUN = 0.25, 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process, by what they are for. Of the device, if that is a GPU; otherwise all is on the host."""

    resident: dict[str, float]
    """There from the first step to the last."""
    step: dict[str, float]
    """There for a part of each step."""
    peak: float
    """The most at any moment."""
    room: float
    """What the device has for this process, or the machine in all."""
    host: dict[str, float]
    """On the host, where `resident` and `step` are on a GPU."""
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the room."""
        return self.peak <= self.room

    def lines(self) -> list[str]:
        """For a person to read."""
        rows = [*self.resident.items(), *self.step.items(), ("peak", self.peak), ("of", self.room)]
        shown = [f"  {name:<58}{size / MIB:>12,.0f} MiB" for name, size in rows]
        host = [f"  {name + ' (host)':<58}{size / MIB:>12,.0f} MiB" for name, size in self.host.items()]
        return [*self.notes, *shown, *host]


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
) -> MemoryPlan:
    """Plan the steps of a run by its first batch.

    Args:
        batch: this process's share of it.
        ranks: processes that compute the loss together.
        batches_waiting: batches that are held ready.
    """
    device = towers.device
    on_gpu = device.type == "cuda"
    # Before anything runs: what a forward has used stays with the process.
    used = 0.0 if on_gpu else float(psutil.Process().memory_info().rss)
    rows, width = sum(len(group) for group in batch.groups), towers.dimension
    passages = rows - batch.queries
    sizes = batch.micro_batch_tokens
    kept = graphs.keep(sizes)
    held = _graphs(towers, precision, batch)
    if config.cuda_graphs:
        whole = [(size, captured_size(size)) for size in sizes]
        held = [h * (r / s if r <= MAX_TOKENS else 1) for h, (s, r) in zip(held, whole, strict=True)]
    passing, waiting = held[: len(sizes) - kept], held[len(sizes) - kept :]
    kept_graphs, once_more = sum(waiting), max(passing, default=0.0)

    trained = [parameter for g in optimizer.param_groups for parameter in g["params"]]
    divided = _Divided.among(ranks, towers) if config.shard_towers else _Divided(1, frozenset())
    gradients = divided.bytes_of(trained)
    held_tensors = [t for module in (towers, loss) for t in (*module.parameters(), *module.buffers())]
    resident = {
        "weights": divided.bytes_of(held_tensors),
        f"optimizer ({config.optim.name})": divided.sum(trained, lambda p: _moments(p, config.optim.name)),
    }
    # safetensors makes bytes of copies, and the larger of the two files is the optimizer's; whole, where it is written.
    checkpoint = 2 * max(resident.values()) * divided.processes
    if on_gpu:
        resident["of the library of products"] = float(_OF_LIBRARY)
    else:
        resident["program, libraries, open data"] = max(0.0, used - sum(tensor.nbytes for tensor in held_tensors))
    half = 0.0
    if on_gpu and precision == "bf16" and divided.processes == 1:
        half = 2.0 * sum(p.numel() for encoder in towers.encoders for p in encoder.parameters())
    # Of replays the sums of gradients stay, and a backward has all of its own at once.
    replayed = config.cuda_graphs and captured_size(min(sizes)) <= MAX_TOKENS
    sums, captured = (gradients, half) if replayed else (0.0, 0.0)
    offloaded = on_gpu and config.offload_embeddings
    at_loss, after_loss = (AT_LOSS_OFFLOADED, 0) if offloaded else (AT_LOSS, _AFTER_LOSS)
    workspace = _workspace(config, batch.queries, passages, width, on_gpu, ranks)
    gathered = divided.gathered(towers, 2 if on_gpu and precision == "bf16" else 4)
    exchanged = _exchanged(passages, width, ranks, config)
    step = {
        "weights in bf16": half,
        "gradients of CUDA graphs": captured,
        "layers gathered from all processes": gathered,
        "gradients": gradients,
        f"graphs kept until the loss ({kept} of {len(sizes)} micro-batches)": kept_graphs,
        "graph of one micro-batch, and its backward": (1 + _BACKWARD) * max(held),
        "embeddings and their gradients": float(at_loss * rows * width),
        "workspace of the loss": workspace,
        "passages on their way between processes": exchanged,
    }
    # A gradient is made whole before it is added to what earlier micro-batches gave.
    adding = max(divided.bytes_of([parameter]) for parameter in trained) if len(sizes) > 1 else 0.0
    begun = gradients + adding + _BACKWARD * max(waiting, default=0.0)
    if on_gpu and len(sizes) == 1:
        # A graph that is the only one has gone when the gradients are there; a CPU's allocator keeps its place.
        begun = _BEGUN * kept_graphs + sums
    moments = [
        kept_graphs + sums + at_loss * rows * width + workspace + exchanged,
        kept_graphs + begun + after_loss * rows * width,
        gradients + adding + (1 + _BACKWARD) * once_more + after_loss * rows * width,
        gradients + max(map(partial(_update, name=config.optim.name), trained)),
    ]
    data = float(batches_waiting * batch_bytes(batch))
    if not on_gpu:
        resident["batches held ready"] = data
        step["a checkpoint while it is written"] = checkpoint
        moments.append(checkpoint)
    on_host = {
        "batches held ready": data,
        "embeddings and their gradients": 8.0 * rows * width if offloaded else 0.0,
        "a checkpoint while it is written": checkpoint,
    }
    return MemoryPlan(
        {name: size for name, size in resident.items() if size},
        {name: size for name, size in step.items() if size},
        sum(resident.values()) + half + captured + gathered + max(moments),
        float(torch.cuda.mem_get_info(device)[1]) if on_gpu else float(psutil.virtual_memory().total),
        {name: size for name, size in on_host.items() if size} if on_gpu else {},
        [
            f"each of {ranks} processes, {device.type}, {precision}: {batch.queries:,} queries and {passages:,} "
            f"passages a step, {batch.tokens:,} tokens in {len(sizes)} micro-batches of at most {max(sizes):,}"
        ],
    )


@dataclass(frozen=True)
class _Divided:
    """Towers whose encoders are divided among processes (models/fsdp.py), or are not."""

    processes: int
    parameters: frozenset[Tensor]
    """Those that each process has a part of."""

    @classmethod
    def among(cls, processes: int, towers: Towers) -> _Divided:
        return cls(processes, frozenset(p for encoder in towers.encoders for p in encoder.parameters()))

    def sum(self, tensors: Iterable[Tensor], size: Callable[[Tensor], float]) -> float:
        """Of what one process has."""
        return float(sum(size(t) / (self.processes if t in self.parameters else 1) for t in tensors))

    def bytes_of(self, tensors: Iterable[Tensor]) -> float:
        return self.sum(tensors, lambda tensor: tensor.nbytes)

    def gathered(self, towers: Towers, number_bytes: int) -> float:
        """What is whole for a while: in backward two layers and the gradient of one, in fp32, beside what stands
        outside of layers."""
        if self.processes == 1:
            return 0.0
        largest = 0.0
        for encoder in towers.encoders:
            layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(encoder)]
            outside = sum(p.numel() for p in encoder.parameters()) - sum(layers)
            largest = max(largest, (2 * number_bytes + 4) * max(layers) + (number_bytes + 4) * outside)
        return largest


def _graphs(towers: Towers, precision: Precision, batch: PreparedBatch) -> list[float]:
    """Bytes that the graph of each micro-batch holds: measured of the largest of each group, since a token of a picture
    holds more than one of a text and features of a locked tower next to nothing; of the others by their tokens."""
    sizes, found = batch.micro_batch_tokens, list[float]()
    for group in batch.groups:
        own = sizes[len(found) : len(found) + len(group.micro_batches)]
        if own:
            largest = int(np.argmax(own))
            held = held_bytes(towers, precision, partial(group.embed, towers, group.micro_batches[largest]))
            found += [held * size / max(1, own[largest]) for size in own]
    return found


def batch_bytes(batch: PreparedBatch) -> int:
    """What a batch holds on the host: token ids or pixels, and ids."""
    masks, found = batch.false_negatives, 0
    if masks is not None:
        found = masks.query_ids.nbytes + masks.passage_ids.nbytes + masks.excluded.nbytes
    for group in batch.groups:
        content: Any = group
        held = [content.pixels] if hasattr(content, "pixels") else [content.tokens.ids, content.tokens.offsets]
        found += sum(array.nbytes for array in held)
    return int(found)


def _moments(parameter: Tensor, name: str) -> float:
    """Bytes of an optimizer's state of one parameter, as optim.py has it."""
    if name == "adamw":
        return 2.0 * parameter.nbytes
    first, rest = parameter.shape[0] if parameter.ndim else 1, parameter.numel()
    rows, columns = first, rest // max(1, first)
    factored = parameter.ndim > 1 and min(rows, columns) >= 32
    return 2.0 * rest + 4.0 * ((rows + columns) if factored else rest)


def _update(parameter: Tensor, name: str) -> float:
    """Bytes that the update of one parameter takes for a while: Adafactor's, in fp32; AdamW's is one kernel."""
    return 4.0 * parameter.numel() if name == "adafactor" else 0.0


def _workspace(config: TrainConfig, queries: int, passages: int, width: int, on_gpu: bool, ranks: int) -> float:
    """What tiles of the score matrix take; a matrix that exists whole takes several times itself, on every process."""
    scores, given = float(queries) * passages, float(config.loss.workspace_mib * MIB)
    if config.loss.name == "clip" or config.loss.implementation in ("full", "dense"):
        return 20 * scores * ranks**2
    if on_gpu:
        return min(given, 16 * scores)
    return min(given, 13 * min(scores, CPU_TILE_ENTRIES) + 24.0 * width * CPU_TILE_ENTRIES**0.5)


def _exchanged(passages: int, width: int, ranks: int, config: TrainConfig) -> float:
    """Blocks of the ring, two on their way and three sums (distributed/ring.py of losses), or the whole pool."""
    if ranks == 1:
        return 0.0
    ring = passages * width * (2 * 4 + 3 * 4)
    pool = ranks * passages * width * 8
    return float(pool if ranks == 2 or pool <= config.loss.workspace_mib * MIB else ring)
