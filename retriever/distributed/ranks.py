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
from retriever.utils.torchrun import attempt


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    size: int = 1
    job: Any = field(default=None, compare=False, repr=False)
    """torchrun's store, which mostly outlives an attempt of the job that fails; none for one process."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and answers."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of all, for a loss over them; none for one process alone."""
        return distributed.group.WORLD if self.size > 1 else None

    @property
    def share(self) -> Share:
        """This process's part of a batch."""
        return Share(self.rank, self.size)

    def note_begun(self, run: str) -> None:
        """Have later attempts of this job know that it has begun this run."""
        if self.job is not None and self.first:
            self.job.set(f"begun {run}", "")

    def have_begun(self, run: str) -> bool:
        """Whether an earlier attempt of this job has begun this run; believed by who cannot tell, one process alone or
        those whose store is a new one."""
        if self.job is None or not any(self.job.check([f"met {earlier}"]) for earlier in range(attempt())):
            return True
        return self.job.check([f"begun {run}"])

    def wait(self) -> None:
        """Until all have come here."""
        # A barrier of several backends would pass through the GPUs, behind all that they have to do.
        self.totals(0)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank passes through the body, then all others: what it writes to the disk, they find there."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return self.most(float(here)) > 0

    def most(self, here: float) -> float:
        """The largest of all ranks' numbers."""
        return self._reduced([here], distributed.ReduceOp.MAX)[0]

    def totals(self, *here: float) -> list[float]:
        """The sums over ranks."""
        return self._reduced(list(here), distributed.ReduceOp.SUM)

    def told(self, here: Any) -> Any:
        """What the first rank has, on all of them: numbers, texts, lists and dictionaries of them."""
        if self.size == 1:
            return here
        content = json.dumps(here).encode() if self.first else b""
        length = int(self.totals(len(content))[0])
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        distributed.broadcast(buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    def reports(self, here: Any) -> list[Any]:
        """What each rank has, in order, on all of them; as `told`."""
        return [
            json.loads(part.tobytes()) for part in self.gathered(np.frombuffer(json.dumps(here).encode(), np.uint8))
        ]

    def gathered(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows [n] of every rank, whose numbers may differ, in order."""
        if self.size == 1:
            return [rows]
        counts = [int(count) for count in self.totals(*np.eye(self.size)[self.rank] * len(rows))]
        padded = np.zeros(max(counts), dtype=rows.dtype)
        padded[: len(rows)] = rows
        found = [torch.empty(max(counts), dtype=torch.from_numpy(padded).dtype) for _ in counts]
        distributed.all_gather(found, torch.from_numpy(padded))
        return [part.numpy()[:count] for part, count in zip(found, counts, strict=True)]

    def _reduced(self, numbers: list[float], how: Any) -> list[float]:
        if self.size == 1:
            return numbers
        # In main memory, where nobody waits for a device.
        exchanged = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(exchanged, how)
        return exchanged.tolist()


@dataclass(frozen=True)
class PlannedRanks(Ranks):
    """The first of so many processes, the others of which are not there: to plan a run, not to make one."""

    @property
    def group(self) -> Any:
        """None: nobody to exchange with."""
        return None

    def wait(self) -> None:
        """For nobody."""
