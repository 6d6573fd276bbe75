"""Create the process group of a job that torchrun started, and choose the device of each rank."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from index.files import InputError
from retriever.distributed.agreement import check_same_on_ranks
from retriever.distributed.errors import report_first_error
from retriever.distributed.ranks import Ranks
from retriever.errors import ConfigError
from retriever.utils.interrupt import default_signal_handlers
from retriever.utils.torchrun import check_environment, local_rank, restart_count, world_size
from retriever.utils.versions import COMPUTING, versions
from retriever.utils.workers import exit_with_parent

# Timeout of a collective operation, after which a rank that hangs ends the job. It does not apply while the others wait
# for a rank that works alone, for example on an index (ranks.py). torchrun notices ranks that ended without it.
TIMEOUT = datetime.timedelta(minutes=20)


@contextlib.contextmanager
def joined_ranks(same: Mapping[str, Any] | None = None, *, on_devices: bool = False) -> Iterator[Ranks]:
    """Context with the process group of all processes that torchrun started, or one rank without torchrun.

    Collectives use gloo for tensors in host memory and, with `on_devices`, NCCL for tensors on GPUs. If a rank fails,
    its error is shown and all ranks end (errors.py).

    Args:
        same: settings that must be equal on all ranks, by name (agreement.py). The versions of the packages that
            affect results are compared, too.
        on_devices: whether to exchange tensors on GPUs. Default: False.

    Yields:
        This process's Ranks.

    Raises:
        ConfigError: the environment variables are not those of a torchrun process.
        InputError: the other processes cannot be reached.
        RanksDifferError: settings or versions differ between ranks.
    """
    check_environment()
    if world_size() == 1:
        yield Ranks()
        return
    # The rendezvous waits outside Python, for up to half an hour if other processes do not start.
    with default_signal_handlers(), exit_with_parent():
        job_store, store, rank, size = _init_process_group("cpu:gloo,cuda:nccl" if on_devices else "gloo")
    with report_first_error(store):
        ranks = Ranks(rank, size, job_store, store)
        check_same_on_ranks(ranks, {**(same or {}), **_compared_versions()})
        yield ranks
        # Only without an error: otherwise the other ranks may never reach this call.
        distributed.destroy_process_group()


def _compared_versions() -> dict[str, str]:
    # The version of Python does not affect results.
    found = versions(*COMPUTING)
    return {f"the version of {name}": version for name, version in found.items() if name != "Python"}


def _init_process_group(backend: str) -> tuple[Any, Any, int, int]:
    """Join the other processes. Returns the stores of the job and of this attempt, the rank and the world size."""
    try:
        job_store, rank, size = next(iter(distributed.rendezvous("env://")))
        job_store.set(f"met {restart_count()}", "")
        # Each attempt has processes with new addresses.
        store = distributed.PrefixStore(f"attempt {restart_count()}", job_store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except ValueError as error:
        # The message names RANK, MASTER_ADDR or another variable.
        raise ConfigError(f"WORLD_SIZE is set, as under torchrun, but: {error}") from None
    except distributed.DistError as error:
        raise InputError(f"the other processes cannot be reached: {str(error).splitlines()[0]}") from None
    return job_store, store, rank, size


def uses_gpus(device: str) -> bool:
    """Whether a process with this --device, which may be "auto", computes on a GPU."""
    return device != "cpu" and torch.cuda.is_available()


def same_settings(command: str, device: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a command that must be equal on all ranks, for `joined_ranks`.

    Args:
        command: name of the command, for example "encode".
        device: value of --device. Only whether it is a GPU is compared.
        settings: argument -> value. Messages name arguments as flags.
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return {"command": command, "device": "cuda" if uses_gpus(device) else "cpu", **flags}


def rank_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, by its local rank, if `device` is `cuda` without an index.

    Raises:
        ConfigError: the local rank is unknown and there are several processes and GPUs.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    number, gpus = local_rank(), torch.cuda.device_count()
    if number is None and world_size() > 1 and gpus > 1:
        raise ConfigError("WORLD_SIZE is set, as under torchrun, but: variable LOCAL_RANK expected, but not set")
    return device if number is None else torch.device("cuda", number % gpus)
