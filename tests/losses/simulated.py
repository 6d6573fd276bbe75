"""Rings of many ranks in one process: one thread per rank, which exchange tensors and count bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SharedState:
    """State shared by the threads of one simulated group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size
        self.queues = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class SimulatedCommunication:
    """`Communication` between threads; `sent` has the bytes of each ring transfer."""

    def __init__(self, shared: SharedState, rank: int) -> None:
        self.shared, self.rank, self.size = shared, rank, shared.size
        self.sent: list[int] = []

    def gather_host(self, numbers: Tensor) -> Tensor:
        return torch.stack(self.shared.exchange(self.rank, numbers))

    def start_exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: int) -> Callable[[], None]:
        target, source = (self.rank + step) % self.size, (self.rank - step) % self.size
        for tensor in outgoing:
            self.sent.append(tensor.numel() * tensor.element_size())
            self.shared.queues[self.rank, target].put(tensor.clone())

        def wait() -> None:
            for tensor in incoming:
                tensor.copy_(self.shared.queues[source, self.rank].get(timeout=60))

        # Poison the buffers, so that reading them before the transfer ends shows.
        for tensor in incoming:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        return wait

    def reduce_max(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.shared.exchange(self.rank, tensor.clone())).amax(0))

    def reduce_sum(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.shared.exchange(self.rank, tensor.clone())).sum(0))

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(rows) == counts[self.rank]
        return torch.cat(self.shared.exchange(self.rank, rows.clone()))

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        whole = torch.stack(self.shared.exchange(self.rank, rows.clone())).sum(0)
        return whole.split(list(counts))[self.rank]


class MirroredCommunication:
    """`Communication` of the first of two ranks with equal shards: what the other sends is what this one sends.

    It needs no threads, which in backward would share one thread for the kernels of a GPU.
    """

    rank, size = 0, 2

    def gather_host(self, numbers: Tensor) -> Tensor:
        return torch.stack([numbers] * 2)

    def start_exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: int) -> Callable[[], None]:
        sent = [tensor.clone() for tensor in outgoing]

        def wait() -> None:
            for tensor, other in zip(incoming, sent, strict=True):
                tensor.copy_(other)

        for tensor in incoming:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        return wait

    def reduce_max(self, tensor: Tensor) -> None:
        """No-op: both ranks have the same values."""

    def reduce_sum(self, tensor: Tensor) -> None:
        # Columns of the pool: the other rank's sums are this rank's, with the two halves of the pool swapped.
        tensor += tensor.roll(tensor.shape[-1] // 2, -1)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return torch.cat([rows] * 2)

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # The other rank's contribution to this rank's passages is this rank's contribution to the other's.
        return rows[: counts[0]] + rows[counts[0] :]


def on_simulated_ranks(size: int, call: Callable[[SimulatedCommunication], Any]) -> list[Any]:
    """Run call(communication) on each of `size` ranks; returns each result, or the rank's exception."""
    shared = SharedState(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = call(SimulatedCommunication(shared, rank))
        except Exception as error:  # noqa: BLE001 - the test raises it in its own thread
            results[rank] = error
            if not isinstance(error, ValueError):
                shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
