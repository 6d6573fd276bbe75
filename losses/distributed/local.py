"""The loss of one process by the same code as over ranks: a group of one, which sends nothing.

Used for the options that `losses/distributed/objectives/choice.py` knows. It stores the float32 sum of the gradient of
all queries, which the loss without options does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.api import DistributedBatch, loss_over_ranks, with_nan_for_invalid_rows
from losses.inputs import ContrastiveBatch
from losses.option_checks.objective import Objective
from losses.precision import Precision


class LocalCommunication:
    """`Communication` of a group of one."""

    rank, size = 0, 1

    def gather_host(self, numbers: Tensor) -> Tensor:
        return numbers[None]

    def start_exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], step: Literal[1, -1]
    ) -> Callable[[], None]:
        return lambda: None

    def reduce_max(self, tensor: Tensor) -> None:
        """The maximum over one rank is the tensor itself."""

    def reduce_sum(self, tensor: Tensor) -> None:
        """The sum over one rank is the tensor itself."""

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows


@torch.compiler.disable
def loss_of_one_process(
    batch: ContrastiveBatch, objective: Objective, precision: Precision, workspace_bytes: int, fused: bool
) -> Tensor:
    """0-dim loss of the batch with the options of `objective`, differentiable once."""
    queries, passages = len(batch.query), len(batch.passage)
    if batch.given_positive is None:
        batch = replace(batch, given_positive=torch.arange(queries, device=batch.query.device))
    batch = with_nan_for_invalid_rows(batch, passages)
    shards = Shards(0, (queries,), (passages,), positive_given=not batch.diagonal)
    communication = LocalCommunication()
    return loss_over_ranks(
        DistributedBatch(batch, shards, communication, precision, workspace_bytes, fused, "ring", objective)
    )
