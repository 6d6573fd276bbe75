"""Several processes train or evaluate together (torchrun): who takes part, what they tell each other."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from index.files import InputError
from retriever.distributed.agreement import agree
from retriever.distributed.errors import first_error_shown
from retriever.distributed.ranks import Ranks
from retriever.errors import ConfigError
from retriever.utils.interrupt import default_signal_handlers
from retriever.utils.torchrun import check_environment, local_rank, world_size
from retriever.utils.versions import COMPUTING, versions
from retriever.utils.workers import exit_with_parent

# One rank may build an index while the others wait; a rank that dies is noticed by torchrun, not by the clock.
PATIENCE = datetime.timedelta(days=1)


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
    if world_size() == 1:
        yield Ranks()
        return
    # Whoever waits for others here does so outside of Python, for half an hour if they do not come.
    with default_signal_handlers(), exit_with_parent():
        job, store, rank, size = _met("cpu:gloo,cuda:nccl" if on_devices else "gloo")
    with report_first_error(store):
        ranks = Ranks(rank, size, job)
        check_same_on_ranks(ranks, {**(same or {}), **_versions()})
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
        job.set(f"met {restart_count()}", "")
        # The addresses of its processes are those of one attempt.
        store = distributed.PrefixStore(f"attempt {restart_count()}", job)
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


def same_settings(command: str, device: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks of one command must have been given, for `joined_ranks`.

    Args:
        command: Name of the command, for example "encode".
        device: The device that was asked for; only whether it is a GPU is compared.
        settings: Argument -> value; messages name them as flags.
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return {"command": command, "device": "cuda" if uses_gpus(device) else "cpu", **flags}


def own_device(device: torch.device) -> torch.device:
    """`cuda` as the GPU of this process's number on its machine.

    Raises:
        ConfigError: the number is not known, and all processes would take the first of several GPUs.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    number, gpus = local_rank(), torch.cuda.device_count()
    if number is None and world_size() > 1 and gpus > 1:
        raise ConfigError("WORLD_SIZE is set, as under torchrun, but: variable LOCAL_RANK expected, but not set")
    return device if number is None else torch.device("cuda", number % gpus)
