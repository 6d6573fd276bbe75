"""Gradient cache: the loss of a whole batch with the activations of few micro-batches in memory.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983. The towers run
twice: first without a graph to compute the embeddings; then, when the loss has given the gradient of each embedding,
again with a graph, one micro-batch at a time, to backpropagate that gradient to the weights. Here as many micro-batches
as fit in memory keep the graph of their first run and run only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from retriever.training.profiler import phase
from retriever.utils.device import to_device, to_host

MicroBatch = TypeVar("MicroBatch")


class RandomState:
    """The state of torch's random generators on the CPU and a device, for the same dropout in both passes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Context that starts from this state. The previous state is restored at its end."""
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def backward(
    encode: Callable[[MicroBatch], Tensor],
    micro_batches: Sequence[MicroBatch],
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    device: torch.device,
    *,
    keep: int = 0,
    on_host: bool = False,
) -> Tensor:
    """Compute the loss over all micro-batches and accumulate the gradients of all weights.

    The result equals that of one backward through all micro-batches, including dropout: the second forward of a
    micro-batch starts from the random state of its first.

    Args:
        encode: returns the embeddings [n, D] of a micro-batch.
        micro_batches: the arguments of `encode`.
        loss_of: returns the scalar loss, given the embeddings of all micro-batches in order.
        device: device of the towers.
        keep: number of micro-batches, the last ones, that keep the graph of their first forward. Default: 0.
        on_host: whether embeddings and their gradients are stored in host memory between the passes. `loss_of` then
            receives host tensors. Default: False.

    Returns:
        The loss as a detached 0-dim tensor.
    """
    recomputed = max(0, len(micro_batches) - keep)
    states, embeddings = [], []
    with torch.no_grad(), phase("forward without graph"):
        for micro_batch in micro_batches[:recomputed]:
            states.append(RandomState(device))
            embedding = encode(micro_batch)
            embeddings.append(to_host(embedding) if on_host else embedding)
    with phase("forward, graph kept"):
        graphs = [encode(micro_batch) for micro_batch in micro_batches[recomputed:]]
    with phase("loss"):
        kept = [graph.detach() for graph in graphs]
        if on_host:
            kept = [to_host(embedding) for embedding in kept]
        leaves = [embedding.requires_grad_() for embedding in embeddings + kept]
        if on_host and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        loss = loss_of(leaves)
        loss.backward()
    # Kept graphs first, so that each frees its memory before another graph is built. In reverse order throughout, so
    # that gradients are bitwise equal for any number of kept graphs.
    with phase("backward"):
        for leaf in reversed(leaves[recomputed:]):
            _backpropagate(leaf, graphs.pop())
    second_passes = list(zip(micro_batches[:recomputed], states, leaves[:recomputed], strict=True))
    for micro_batch, state, leaf in reversed(second_passes):
        with phase("second forward"), state.restored():
            embedding = encode(micro_batch)
        with phase("backward"):
            _backpropagate(leaf, embedding)
    return loss.detach()


def _backpropagate(leaf: Tensor, embedding: Tensor) -> None:
    # The embeddings of a frozen tower without a projection do not require gradients.
    if embedding.requires_grad:
        gradient = leaf.grad
        assert gradient is not None
        if gradient.device != embedding.device:
            gradient = to_device(gradient, embedding.device)
        embedding.backward(gradient)
        leaf.grad = None
