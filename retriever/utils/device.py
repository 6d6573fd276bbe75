"""Choose device and precision, and copy tensors between host and GPU."""

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
from retriever.errors import ArgumentError
from retriever.utils.staging import Staging

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]

# Above this size a copy takes longer than the synchronization that overlaps it with kernels.
STAGED_BYTES = 1 << 20

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is cuda if available, otherwise cpu.

    "mps" is the GPU of an Apple computer. Operations that it lacks run on the CPU (see `retriever/__init__.py`), and so
    do losses and exact search, which need float64. It is never chosen by "auto".

    Raises:
        ConfigError: the name is not auto, cpu, cuda[:index] or mps.
        InputError: this machine does not have the device, or its GPU is not supported.
    """
    if isinstance(name, str) and re.fullmatch(r"xpu(:\d+)?", name):
        raise ArgumentError("device", f"Intel GPUs are not supported: expected auto, cpu, cuda or mps, found {name!r}")
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:(\d|[1-9]\d))?", name):
        raise ArgumentError("device", f"expected auto, cpu, cuda[:number] or mps, found {name!r}")
    if name != "cpu" and torch.version.hip is not None and torch.cuda.is_available():
        # PyTorch for AMD GPUs calls them cuda. The Triton kernels are written for NVIDIA GPUs, and run on no other.
        raise InputError(f"device: AMD GPUs (ROCm) are not supported: expected cpu, found {name!r}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device: {name!r} is not on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return device


def choose_precision(name: PrecisionChoice, device: torch.device) -> Precision:
    """Return the precision of a name; "auto" is bf16 if the hardware supports it natively, otherwise fp32.

    Raises:
        ConfigError: the device is mps, which computes in fp32, and another precision is requested.
    """
    if device.type == "mps" and name not in ("auto", "fp32"):
        raise ArgumentError("precision", f"expected fp32 on mps, found {name}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "mps":
        return "fp32"
    # Without AMX a CPU is slower in bf16 than in fp32: a step of MiniLM takes 1.6 times as long with avx512_bf16 and 20
    # times as long without.
    return "bf16" if "amx_bf16" in _cpu_flags() else "fp32"


def choose_encoding_precision(name: PrecisionChoice, device: torch.device) -> Precision:
    """Return the precision in which a model embeds; "auto" is bf16 on GPUs that support it natively, otherwise fp32.

    CPUs with and without AMX thus give the same embeddings.
    """
    return choose_precision("fp32" if name == "auto" and device.type != "cuda" else name, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without synchronization. For the CPU it returns the tensor itself.

    A large tensor is copied on a side stream, overlapped with computation. A tensor in pinned memory is read later, on
    the current stream, and must not be modified before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes >= STAGED_BYTES and not tensor.is_pinned():
        return _staging(device).to_device(tensor)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a GPU tensor to pinned memory without synchronization. For a CPU tensor it returns the tensor itself.

    The values are valid after the current stream has been synchronized.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def loss_device(device: torch.device) -> torch.device:
    """Return the device of the loss for towers on `device`: the same one, but the CPU for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@functools.cache
def _staging(device: torch.device) -> Staging:
    return Staging(device)


class HostCopy:
    """An asynchronous copy of a tensor to the host, queued on the current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._event = tensor if tensor.device.type == "cuda" else tensor.cpu(), None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def array(self) -> np.ndarray:
        """Wait for the copy and return the values."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()


def _cpu_flags() -> set[str]:
    """Return the flags of /proc/cpuinfo; empty on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """Return the autocast context of a precision; it does nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST_DTYPES[precision])


def memory_in_use_mib(device: torch.device) -> float:
    """Return memory in use, in MiB: the peak of torch's allocator on a GPU, the resident set of this process on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
