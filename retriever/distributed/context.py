"""Several processes train or evaluate together (torchrun): who takes part, what they tell each other."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed

from index.files import InputError
from retriever.data.schedule import Share
from retriever.distributed.agreement import agree
from retriever.distributed.errors import first_error_shown
from retriever.errors import ConfigError
from retriever.utils.interrupt import signals_end_at_once
from retriever.utils.progress import Terminal
from retriever.utils.torchrun import attempt, check_environment, local_rank, process_count
from retriever.utils.versions import versions
from retriever.utils.workers import ended_with_parent

# One rank may build an index while the others wait; a rank that dies is noticed by torchrun, not by the clock.
PATIENCE = datetime.timedelta(days=1)
# Packages of which other versions may give other numbers.
COMPUTING = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


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


class SilentTerminal(Terminal):
    """For all ranks but the first: one of them speaks."""

    def line(self, text: str) -> None:
        """Say nothing."""


@contextlib.contextmanager
def joined_ranks(same: Mapping[str, Any] | None = None, *, on_devices: bool = False) -> Iterator[Ranks]:
    """The processes of this torchrun as one group; alone without one.

    What lies in main memory is exchanged by gloo; with `on_devices` what lies on GPUs by NCCL. The first error of any
    ends all (errors.py).

    Args:
        same: what must be the same for all, by name (agreement.py), beside the versions of what computes.

    Raises:
        ConfigError: the environment is not that of a process of torchrun.
        InputError: the others cannot be reached.
        RanksDifferError: ranks have started other commands, or other versions.
    """
    check_environment()
    if process_count() == 1:
        yield Ranks()
        return
    # Whoever waits for others here does so outside of Python, for half an hour if they do not come.
    with signals_end_at_once(), ended_with_parent():
        job, store, rank, size = _met("cpu:gloo,cuda:nccl" if on_devices else "gloo")
    with first_error_shown(store):
        ranks = Ranks(rank, size, job)
        agree(ranks, {**(same or {}), **_versions()})
        yield ranks
        # After an error others may never come to this.
        distributed.destroy_process_group()


def _versions() -> dict[str, str]:
    # Another Python computes the same.
    return {f"the version of {name}": found for name, found in versions(*COMPUTING).items() if name != "Python"}


def _met(backend: str) -> tuple[Any, Any, int, int]:
    """Join the others; the store of the job and that of this attempt, this process's rank, and how many there are."""
    try:
        job, rank, size = next(iter(distributed.rendezvous("env://")))
        job.set(f"met {attempt()}", "")
        # The addresses of its processes are those of one attempt.
        store = distributed.PrefixStore(f"attempt {attempt()}", job)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except ValueError as error:
        # Of RANK, MASTER_ADDR and the like, which it names.
        raise ConfigError(f"WORLD_SIZE is set, as under torchrun, but: {error}") from None
    except distributed.DistError as error:
        raise InputError(f"the other processes cannot be reached: {str(error).splitlines()[0]}") from None
    return job, store, rank, size


def uses_gpus(device: str) -> bool:
    """Whether a process that is asked for that device, "auto" perhaps, will compute on a GPU."""
    return device != "cpu" and torch.cuda.is_available()


def own_device(device: torch.device) -> torch.device:
    """`cuda` as the GPU of this process's number on its machine.

    Raises:
        ConfigError: the number is not known, and all processes would take the first of several GPUs.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    number, gpus = local_rank(), torch.cuda.device_count()
    if number is None and process_count() > 1 and gpus > 1:
        raise ConfigError("WORLD_SIZE is set, as under torchrun, but: variable LOCAL_RANK expected, but not set")
    return device if number is None else torch.device("cuda", number % gpus)
