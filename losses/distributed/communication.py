"""Communication between the ranks of a process group: point-to-point along a ring, and collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed

# torch 2.13 renamed these functions and deprecated the old names.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Communication(Protocol):
    """One rank's interface to its group. Every rank calls the same methods in the same order.

    `GroupCommunication` is the implementation for process groups. Tests simulate many ranks in one process.
    """

    rank: int
    size: int

    def gather_host(self, numbers: Tensor) -> Tensor:
        """all_gather of [k] int64 on the CPU, with the same k on every rank; returns [size, k]."""

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        """Start sending `outgoing` to rank + step and receiving `incoming` from rank − step.

        Returns a function that waits for both. The lists match those of the neighbors, tensor by tensor. Empty
        tensors are not sent. On a GPU the transfer is ordered after the work on the current stream and overlaps with
        later work; waiting blocks the stream, not the host.
        """

    def reduce_max(self, tensor: Tensor) -> None:
        """all_reduce with the elementwise maximum, in place."""

    def reduce_sum(self, tensor: Tensor) -> None:
        """all_reduce with the elementwise sum, in place."""

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """all_gather of [counts[rank], …] into [sum(counts), …], in rank order."""

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """reduce_scatter of [sum(counts), …]: this rank's [counts[rank], …] of the sum over ranks."""


class GroupCommunication:
    """Communication over a torch.distributed process group: NCCL for GPU tensors, gloo for CPU tensors."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        # A group with NCCL only exchanges host numbers through the device, so the host waits for it.
        on_host = "cpu:" in str(distributed.get_backend_config(group))
        self._header_device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    def gather_host(self, numbers: Tensor) -> Tensor:
        gathered = torch.empty(self.size, len(numbers), dtype=numbers.dtype, device=self._header_device)
        _all_gather(gathered.view(-1), numbers.to(self._header_device), group=self.group)
        return gathered.cpu()

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        target, source = (self.rank + step) % self.size, (self.rank - step) % self.size
        sends = [self._operation(distributed.isend, tensor, target) for tensor in outgoing if tensor.numel()]
        receives = [self._operation(distributed.irecv, tensor, source) for tensor in incoming if tensor.numel()]
        works = distributed.batch_isend_irecv(sends + receives) if sends or receives else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def _operation(self, call: Any, tensor: Tensor, peer: int) -> Any:
        return distributed.P2POp(call, tensor, group=self.group, group_peer=peer)

    def reduce_max(self, tensor: Tensor) -> None:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.group)

    def reduce_sum(self, tensor: Tensor) -> None:
        distributed.all_reduce(tensor, group=self.group)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        max_count = max(counts)
        padded = rows if len(rows) == max_count else rows.new_zeros(max_count, *rows.shape[1:])
        if padded is not rows:
            padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * max_count, *rows.shape[1:])
        # As bytes, because gloo does not support every dtype.
        _all_gather(_bytes(gathered), _bytes(padded.contiguous()), group=self.group)
        if min(counts) == max_count:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(max_count), counts, strict=True)])

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        max_count = max(counts)
        if min(counts) < max_count:
            padded = rows.new_zeros(self.size, max_count, *rows.shape[1:])
            for target, part in zip(padded, rows.split(list(counts)), strict=True):
                target[: len(part)] = part
            rows = padded.flatten(0, 1)
        own = rows.new_empty(max_count, *rows.shape[1:])
        _reduce_scatter(own, rows, group=self.group)
        return own[: counts[self.rank]]


def communication_of(group: Any) -> Communication:
    """The communication of a process group that contains this process; a Communication is returned as it is.

    Raises:
        ValueError: If `group` is neither, or does not contain this process.
    """
    if isinstance(group, distributed.ProcessGroup):
        return GroupCommunication(group)
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not contain this process: only its members compute the loss")
    if hasattr(group, "gather_host"):
        return group
    raise ValueError(f"group must be a torch.distributed process group or None, found {type(group).__name__}")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
