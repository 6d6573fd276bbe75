"""Where and in what arithmetic the towers run."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from index.files import InputError
from retriever.errors import ConfigError
from retriever.utils.staging import Staging

Precision = Literal["fp32", "bf16", "fp16"]

# From here on a copy takes longer than the events that let it run beside kernels.
STAGED_BYTES = 1 << 20

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA where there is one.

    Raises:
        ConfigError: no name of a device that serves.
        InputError: no such device on this machine.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:(\d|[1-9]\d))?", name):
        raise ConfigError(f"--device: expected auto, cpu or cuda[:number], found {name!r}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return device


def choose_precision(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The arithmetic of that name; "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    # Without AMX a CPU takes longer in bf16 than in fp32: 1.6 times as long for a step of MiniLM where it has
    # avx512_bf16, twenty times where it has neither.
    return "bf16" if "amx_bf16" in _cpu_flags() else "fp32"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device (itself on the CPU), for which neither the host nor the device waits; a
    large one is copied beside what the device computes. One in pinned memory is read when the current stream comes to
    it, and must not be written before."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes >= STAGED_BYTES and not tensor.is_pinned():
        return _staging(device).bring(tensor)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor in pinned memory, whole once the current stream has come to it; of a CPU's, itself."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@functools.cache
def _staging(device: torch.device) -> Staging:
    return Staging(device)


class HostCopy:
    """A tensor on its way to the host: copied behind what the device has still to do, while the caller goes on."""

    def __init__(self, tensor: Tensor):
        self._copy, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def array(self) -> np.ndarray:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()


def _cpu_flags() -> set[str]:
    """What Linux says of the processor; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """The towers' arithmetic: nothing for fp32, autocast for bf16 and fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST_DTYPES[precision])


def memory_in_use_mib(device: torch.device) -> float:
    """Memory in use, MiB: the peak of torch's allocator on a GPU, this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
