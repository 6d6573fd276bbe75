"""One process as a group of one rank, so that one implementation serves both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor


class LocalCommunication:
    """`losses.distributed.communication.Communication` of a process alone."""

    rank, size = 0, 1

    def gather_host(self, numbers: Tensor) -> Tensor:
        return numbers[None]

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        return lambda: None

    def reduce_max(self, tensor: Tensor) -> None:
        """No-op."""

    def reduce_sum(self, tensor: Tensor) -> None:
        """No-op."""

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows
