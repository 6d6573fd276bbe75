"""The processes of a job, and what they exchange in main memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed

from retriever.distributed.share import Share
from retriever.utils.torchrun import restart_count


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    world_size: int = 1
    job_store: Any = field(default=None, compare=False, repr=False)
    """torchrun's store, which mostly outlives an attempt of the job that fails; none for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and answers."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of all, for a loss over them; none for one process alone."""
        return distributed.group.WORLD if self.world_size > 1 else None

    @property
    def share(self) -> Share:
        """This process's part of a batch."""
        return Share(self.rank, self.world_size)

    def mark_started(self, run: str) -> None:
        """Have later attempts of this job know that it has begun this run."""
        if self.job_store is not None and self.is_first:
            self.job_store.set(f"begun {run}", "")

    def has_started(self, run: str) -> bool:
        """Whether an earlier attempt of this job has begun this run; believed by who cannot tell, one process alone or
        those whose store is a new one."""
        if self.job_store is None or not any(
            self.job_store.check([f"met {earlier}"]) for earlier in range(restart_count())
        ):
            return True
        return self.job_store.check([f"begun {run}"])

    def barrier(self) -> None:
        """Until all have come here."""
        # A barrier of several backends would pass through the GPUs, behind all that they have to do.
        self.all_reduce_sum(0)

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """The first rank passes through the body, then all others: what it writes to the disk, they find there."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return self.all_reduce_max(float(here)) > 0

    def all_reduce_max(self, here: float) -> float:
        """The largest of all ranks' numbers."""
        return self._reduced([here], distributed.ReduceOp.MAX)[0]

    def all_reduce_sum(self, *here: float) -> list[float]:
        """The sums over ranks."""
        return self._reduced(list(here), distributed.ReduceOp.SUM)

    def broadcast(self, here: Any) -> Any:
        """What the first rank has, on all of them: numbers, texts, lists and dictionaries of them."""
        if self.world_size == 1:
            return here
        content = json.dumps(here).encode() if self.is_first else b""
        length = int(self.all_reduce_sum(len(content))[0])
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.is_first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        distributed.broadcast(buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    def all_gather(self, here: Any) -> list[Any]:
        """What each rank has, in order, on all of them; as `told`."""
        return [
            json.loads(part.tobytes())
            for part in self.all_gather_rows(np.frombuffer(json.dumps(here).encode(), np.uint8))
        ]

    def all_gather_rows(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows [n] of every rank, whose numbers may differ, in order."""
        if self.world_size == 1:
            return [rows]
        counts = [int(count) for count in self.all_reduce_sum(*np.eye(self.world_size)[self.rank] * len(rows))]
        padded = np.zeros(max(counts), dtype=rows.dtype)
        padded[: len(rows)] = rows
        found = [torch.empty(max(counts), dtype=torch.from_numpy(padded).dtype) for _ in counts]
        distributed.all_gather(found, torch.from_numpy(padded))
        return [part.numpy()[:count] for part, count in zip(found, counts, strict=True)]

    def _reduced(self, numbers: list[float], how: Any) -> list[float]:
        if self.world_size == 1:
            return numbers
        # In main memory, where nobody waits for a device.
        exchanged = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(exchanged, how)
        return exchanged.tolist()


@dataclass(frozen=True)
class DryRunRanks(Ranks):
    """The first of so many processes, the others of which are not there: to plan a run, not to make one."""

    @property
    def group(self) -> Any:
        """None: nobody to exchange with."""
        return None

    def barrier(self) -> None:
        """For nobody."""
