"""Gradient cache: the loss of a whole batch with few micro-batches' activations in memory.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983. The towers run
twice: once without a graph for the embeddings, and, once the loss has given the gradient at each embedding, again
micro-batch by micro-batch with a graph to carry that gradient to the weights. Here as many micro-batches as memory
allows keep the graph of their first run, and run once.
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
    """The state of torch's random generators (CPU and the device's), so that dropout falls alike in both passes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run the body from this state; the generators then go on from where they were before."""
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
    """Compute the loss over all micro-batches and add its gradients to whatever `encode` and `loss_of` depend on.

    The result is that of one backward through all micro-batches together, dropout included: each second forward runs
    from the random state of its first.

    Args:
        encode: embeddings [n, D] of a micro-batch, with a graph where any weight of it is trained.
        micro_batches: what `encode` takes, one after another.
        loss_of: scalar loss from the embeddings of every micro-batch, in order; what it returns is run backward.
        device: whose random generator `encode` draws from, beside the CPU's.
        keep: how many micro-batches, the last ones, keep the graph of their first forward.
        on_host: embeddings wait on the host for the loss, which is given them there, and their gradients for the
            second passes.

    Returns:
        The loss, a detached scalar.
    """
    again = max(0, len(micro_batches) - keep)
    states, embeddings = [], []
    with torch.no_grad(), phase("forward without graph"):
        for micro_batch in micro_batches[:again]:
            states.append(RandomState(device))
            embedding = encode(micro_batch)
            embeddings.append(to_host(embedding) if on_host else embedding)
    with phase("forward, graph kept"):
        graphs = [encode(micro_batch) for micro_batch in micro_batches[again:]]
    with phase("loss"):
        first = [graph.detach() for graph in graphs]
        leaves = [
            each.requires_grad_() for each in embeddings + ([to_host(each) for each in first] if on_host else first)
        ]
        if on_host and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        loss = loss_of(leaves)
        loss.backward()
    # Kept graphs first: each gives its memory back before another is built. Last ones first throughout: sums of
    # gradients are then the same bits, however many graphs were kept.
    with phase("backward"):
        for leaf in reversed(leaves[again:]):
            _carry(leaf, graphs.pop())
    for micro_batch, state, leaf in reversed(list(zip(micro_batches[:again], states, leaves[:again], strict=True))):
        with phase("second forward"), state.restored():
            embedding = encode(micro_batch)
        with phase("backward"):
            _carry(leaf, embedding)
    return loss.detach()


def _carry(leaf: Tensor, embedding: Tensor) -> None:
    # A locked tower without a projection has no weights to carry it to.
    if embedding.requires_grad:
        assert leaf.grad is not None
        embedding.backward(
            leaf.grad if leaf.grad.device == embedding.device else to_device(leaf.grad, embedding.device)
        )
        leaf.grad = None
