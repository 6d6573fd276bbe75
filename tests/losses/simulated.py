"""Rings of many ranks in one process: a thread each, which hand tensors over and count their bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Meeting:
    """Where the threads of one simulated group meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.places: list[Any] = [None] * size
        self.mail = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.places[rank] = value
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


class SimulatedCommunication:
    """losses.distributed.communication.Communication among threads; `sent` counts the bytes of each ring transfer."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.sent: list[int] = []

    def gather_host(self, numbers: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, numbers))

    def start_exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: int) -> Callable[[], None]:
        ahead, behind = (self.rank + step) % self.size, (self.rank - step) % self.size
        for tensor in outgoing:
            self.sent.append(tensor.numel() * tensor.element_size())
            self.meeting.mail[self.rank, ahead].put(tensor.clone())

        def wait() -> None:
            for tensor in incoming:
                tensor.copy_(self.meeting.mail[behind, self.rank].get(timeout=60))

        # What arrives late must not be used early.
        for tensor in incoming:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        return wait

    def reduce_max(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.meeting.exchange(self.rank, tensor.clone())).amax(0))

    def reduce_sum(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.meeting.exchange(self.rank, tensor.clone())).sum(0))

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(rows) == counts[self.rank]
        return torch.cat(self.meeting.exchange(self.rank, rows.clone()))

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        whole = torch.stack(self.meeting.exchange(self.rank, rows.clone())).sum(0)
        return whole.split(list(counts))[self.rank]


class MirroredCommunication:
    """losses.distributed.communication.Communication of the first of two ranks whose shards are alike: what the other
    sends is what this one sends.

    Without threads, which the kernels of a GPU in backward would share one of.
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
        """Alike on both."""

    def reduce_sum(self, tensor: Tensor) -> None:
        # Of passages of the pool: this one's are the other's other half.
        tensor += tensor.roll(tensor.shape[-1] // 2, -1)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return torch.cat([rows] * 2)

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # What the other adds to this one's passages is what this one adds to the other's.
        return rows[: counts[0]] + rows[counts[0] :]


def on_simulated_ranks(size: int, call: Callable[[SimulatedCommunication], Any]) -> list[Any]:
    """call(communication) on each of `size` ranks; what each returned, or the first error."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = call(SimulatedCommunication(meeting, rank))
        except Exception as error:  # noqa: BLE001 - the test raises it in its own thread
            results[rank] = error
            if not isinstance(error, ValueError):
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
