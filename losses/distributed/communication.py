"""How the ranks of a process group exchange what a loss over them needs: with neighbours on a ring, or all with all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed

# torch 2.13 gave them new names and warns of the old ones.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Communication(Protocol):
    """One rank's side of a group. Every rank calls the same methods in the same order.

    `GroupCommunication` is the real one; tests simulate rings of many ranks in one process and count bytes.
    """

    rank: int
    size: int

    def gather_host(self, numbers: Tensor) -> Tensor:
        """[k] int64 of the CPU, the same k everywhere -> [size, k]."""

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        """Begin to send to rank + step and to receive from rank − step; the call of what is returned waits for both.

        Both lists match the neighbours', tensor by tensor; empty tensors are not sent. On a GPU the transfer follows
        what the current stream holds and runs beside what comes next, and waiting makes the stream wait, not the host.
        """

    def reduce_max(self, tensor: Tensor) -> None:
        """The elementwise largest over ranks, in target."""

    def reduce_sum(self, tensor: Tensor) -> None:
        """The elementwise sum over ranks, in target."""

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """[counts[rank], …] -> [sum(counts), …], in the order of ranks."""

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """[sum(counts), …] -> this rank's [counts[rank], …] of their sum over ranks."""


class GroupCommunication:
    """The communication of a torch.distributed process group: NCCL for tensors of GPUs, gloo for those of CPUs."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        # A group of NCCL alone exchanges host numbers through the device, and then the host waits for it.
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
        most = max(counts)
        padded = rows if len(rows) == most else rows.new_zeros(most, *rows.shape[1:])
        if padded is not rows:
            padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * most, *rows.shape[1:])
        # As bytes: gloo does not know every dtype.
        _all_gather(_bytes(gathered), _bytes(padded.contiguous()), group=self.group)
        if min(counts) == most:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        most = max(counts)
        if min(counts) < most:
            padded = rows.new_zeros(self.size, most, *rows.shape[1:])
            for target, part in zip(padded, rows.split(list(counts)), strict=True):
                target[: len(part)] = part
            rows = padded.flatten(0, 1)
        own = rows.new_empty(most, *rows.shape[1:])
        _reduce_scatter(own, rows, group=self.group)
        return own[: counts[self.rank]]


def communication_of(group: Any) -> Communication:
    """The communication of a process group that this process belongs to; a Communication stands for itself.

    Raises:
        ValueError: `group` is neither, or this process is not in it.
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
