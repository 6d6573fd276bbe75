"""How much passes through the towers at once, and how many graphs of it may wait for the loss: from free memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from retriever.device import Precision
from retriever.half_weights import arithmetic
from retriever.towers import Towers

# On a CPU memory is not counted: a small batch keeps its graph, of a large one every micro-batch runs twice.
# Measured with MiniLM on two cores: 1536 to 6144 tokens are equally fast.
CPU_TOKENS = 4096
# On a GPU, as many as memory has room for, within these: fewer starve it, more gain nothing (scripts/bench_train.py).
LEAST_TOKENS, MOST_TOKENS = 4096, 131072

# Bytes for each number of an embedding while the loss is computed: as a leaf, in order, in the products' precision,
# sums of its gradient, and this on its way to the leaf. What waits on the host is there in order, and as sums.
AT_LOSS, AT_LOSS_OFFLOADED = 20, 14

_PROBE_TOKENS, _PROBE_LENGTH = 8192, 128
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
        """Measure a small micro-batch on a GPU and divide what is free; on a CPU take fixed sizes.

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
            return cls(tokens, tokens)
        token_bytes = graph_bytes(towers, precision)
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        parameters = sum(p.numel() for p in towers.parameters() if p.requires_grad)
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


def fitting_tokens(most: float) -> int:
    """Tokens of a micro-batch, so that whole ones, two at least, fill memory for `most` tokens' graphs.

    Beside the graphs that are kept lies what the backward of one needs.
    """
    count = max(2, math.ceil(most / MOST_TOKENS - _BACKWARD))
    tokens = int(np.clip(most / (count + _BACKWARD), LEAST_TOKENS, MOST_TOKENS))
    return tokens // 1024 * 1024


def encode_tokens(device: torch.device) -> int:
    """Tokens that pass through a tower at once where no graph is kept, if nothing else is asked for."""
    return CPU_TOKENS if device.type != "cuda" else 65536


def graph_bytes(towers: Towers, precision: Precision) -> float:
    """Bytes that one token's graph holds from its forward to its backward, in the tower where it holds most; measured,
    on a GPU."""
    device, most = towers.device, 0.0
    for tokens, embed in towers.probes(_PROBE_TOKENS, _PROBE_LENGTH):
        with torch.random.fork_rng(devices=[device]), arithmetic(towers, precision):
            before = torch.cuda.memory_allocated(device)
            embeddings = embed()
            most = max(most, (torch.cuda.memory_allocated(device) - before) / tokens)
            del embeddings
    return most
