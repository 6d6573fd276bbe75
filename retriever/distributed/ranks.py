"""The ranks of a distributed job and their collective operations in host memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed

from retriever.distributed.share import Share
from retriever.utils.torchrun import restart_count

# Longest pause in seconds between looks at the store.
MAX_PAUSE = 0.5


@dataclass(frozen=True)
class Ranks:
    """This process as one rank of a job started by torchrun; by default a job of one process.

    Every rank must call the collective methods in the same order.
    """

    rank: int = 0
    world_size: int = 1
    job_store: Any = field(default=None, compare=False, repr=False)
    """Key-value store of torchrun, which usually survives a restart of the processes. None for one process."""
    store: Any = field(default=None, compare=False, repr=False)
    """Key-value store of this attempt of the job. None for one process."""
    _waits: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints results."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of all ranks, or None for one process."""
        return distributed.group.WORLD if self.world_size > 1 else None

    @property
    def share(self) -> Share:
        """The share of each batch that belongs to this rank."""
        return Share(self.rank, self.world_size)

    def mark_started(self, run: str) -> None:
        """Record for later restarts of this job that it has started the run."""
        if self.job_store is not None and self.is_first:
            self.job_store.set(f"begun {run}", "")

    def has_started(self, run: str) -> bool:
        """Whether this job started the run before a restart. True if unknown: one process, or a new store."""
        # context.py sets the key "met N" in attempt N.
        if self.job_store is None or not any(self.job_store.check([f"met {n}"]) for n in range(restart_count())):
            return True
        return self.job_store.check([f"begun {run}"])

    def barrier(self) -> None:
        """Wait until all ranks have reached this call, however long that takes."""
        self._wait_for_all()
        # `distributed.barrier` with several backends would run on the GPUs, after all work that is queued there.
        self.all_reduce_sum(0)

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Context in which rank 0 runs first and the other ranks wait, so that they find the files that it wrote."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return self.all_reduce_max(float(value)) > 0

    def all_reduce_max(self, value: float) -> float:
        """Return the maximum of `value` over ranks."""
        return self._all_reduce([value], distributed.ReduceOp.MAX)[0]

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum of each value over ranks."""
        return self._all_reduce(list(values), distributed.ReduceOp.SUM)

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank. It must be serializable as JSON."""
        if self.world_size == 1:
            return value
        content = json.dumps(value).encode() if self.is_first else b""
        # Rank 0 may have read files for hours.
        self._wait_for_all()
        length = int(self.all_reduce_sum(len(content))[0])
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.is_first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        distributed.broadcast(buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank. They must be serializable as JSON."""
        content = np.frombuffer(json.dumps(value).encode(), np.uint8)
        return [json.loads(part.tobytes()) for part in self.all_gather_rows(content)]

    def all_gather_rows(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the rows [n] of all ranks, in rank order. n may differ between ranks."""
        if self.world_size == 1:
            return [rows]
        counts = [int(count) for count in self.all_reduce_sum(*np.eye(self.world_size)[self.rank] * len(rows))]
        padded = np.zeros(max(counts), dtype=rows.dtype)
        padded[: len(rows)] = rows
        gathered = [torch.empty(max(counts), dtype=torch.from_numpy(padded).dtype) for _ in counts]
        distributed.all_gather(gathered, torch.from_numpy(padded))
        return [part.numpy()[:count] for part, count in zip(gathered, counts, strict=True)]

    def _wait_for_all(self) -> None:
        """Wait for all ranks through the store, which has no timeout. Collectives have one (context.py).

        A rank that fails meanwhile ends the others (errors.py).
        """
        if self.store is None:
            return
        key, pause = f"wait {next(self._waits)}", 0.001
        arrived = self.store.add(key, 1)
        while arrived < self.world_size:
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)
            arrived = self.store.add(key, 0)

    def _all_reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return values
        # In host memory, so that nothing waits for a device.
        reduced = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(reduced, operation)
        return reduced.tolist()


@dataclass(frozen=True)
class DryRunRanks(Ranks):
    """Rank 0 of a job whose other processes do not exist, for planning a run without starting it."""

    @property
    def group(self) -> Any:
        """None: there is no process group."""
        return None

    def barrier(self) -> None:
        """No-op."""
