"""Timing of several calls in alternation, and the device memory that they take."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MIB = 2**20


class Times(NamedTuple):
    """What one call took, in seconds."""

    wall: float
    processor: float
    """Processor time of this process, which other programs disturb less than the wall clock."""


def time_alternately(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    min_seconds: float = 0.0,
    on_result: Callable[[str, int, Any], None] | None = None,
) -> dict[str, list[Times]]:
    """Time every call once per round, so that other load on the machine disturbs all of them alike.

    Each round starts with another call. Round 0 warms up and is not counted.

    Args:
        calls: The functions to time, by name.
        rounds: The smallest number of counted rounds.
        min_seconds: Rounds continue until the first call has taken this long in all, warm-up included. Default: 0.
        on_result: Receives the name, the round and the returned value of every call, outside the measured time.
    """
    times: dict[str, list[Times]] = {name: [] for name in calls}
    names = list(calls)
    first = names[0]
    while len(times[first]) <= rounds or sum(each.wall for each in times[first]) < min_seconds:
        number = len(times[first])
        for name in names:
            synchronize()
            started, worked = time.perf_counter(), time.process_time()
            result = calls[name]()
            synchronize()
            times[name].append(Times(time.perf_counter() - started, time.process_time() - worked))
            if on_result is not None:
                on_result(name, number, result)
        names.append(names.pop(0))
    return {name: found[1:] for name, found in times.items()}


def synchronize(device: torch.device | None = None) -> None:
    """Wait until the GPU has finished its work. No-op for a CPU device and without a GPU."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Collect garbage, and return the cached blocks of torch's allocator to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Release memory and restart the measurement of `peak_mib`."""
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """Largest MiB that torch's allocator has held on the GPU since `reset_peak_memory`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0
