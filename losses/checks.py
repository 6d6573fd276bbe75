"""Checks of single values: numbers, choices, dtypes and indices."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# 2**40 MiB are an exbibyte.
MAX_WORKSPACE_MIB = 2**40


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, sums and gradient accumulators: float64 for float64 embeddings, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(*tensors: Tensor) -> Tensor:
    """0-dim bool, whether all values are finite; makes no copy and does not synchronize with the device."""
    extremes = [extreme for tensor in tensors for extreme in tensor.aminmax()]
    return torch.stack(extremes).isfinite().all()


def check_bool(name: str, value: bool) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, found {value!r:.40}")


def check_choice(name: str, value: str, kind: Any) -> None:
    """Raise a ValueError unless `value` is one of the values of the Literal `kind`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, found {value!r}")


def can_check_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be checked.

    Not on a GPU, to avoid a synchronization, and not under torch.compile.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_workspace(workspace_mib: float) -> int:
    """The workspace in bytes.

    Raises:
        ValueError: If `workspace_mib` is not a positive number.
    """
    numeric = isinstance(workspace_mib, int | float) and not isinstance(workspace_mib, bool)
    if not numeric or not 0 < workspace_mib < MAX_WORKSPACE_MIB:
        raise ValueError(f"workspace_mib must be a positive number of MiB, found {workspace_mib!r:.40}")
    return int(workspace_mib * 2**20)


def checked_number(name: str, value: float | Tensor, query: Tensor) -> Tensor:
    """Convert a number or 0-dim tensor to a 0-dim tensor on the query's device, in the accumulator dtype.

    Raises:
        ValueError: If `value` is neither, or is not finite in that dtype.
    """
    dtype = accumulator_dtype(query.dtype)
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} must be a number or a 0-dim floating-point tensor, "
                f"found shape {list(value.shape)} of {value.dtype}"
            )
        if value.device != query.device:
            raise ValueError(f"{name} is on {value.device}, query is on {query.device}")
        if can_check_values(value):
            _check_finite(name, value.item(), dtype)
        return value.to(dtype)
    check_number(name, value, dtype, "a number or a 0-dim tensor")
    return torch.full((), value, dtype=dtype, device=query.device)


def check_number(name: str, value: float, dtype: torch.dtype = torch.float32, wanted: str = "a number") -> None:
    """Raise a ValueError unless `value` is a number that is finite in `dtype`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be {wanted}, found {type(value).__name__}")
    _check_finite(name, value, dtype)


def _check_finite(name: str, value: float, dtype: torch.dtype) -> None:
    # The comparison is negated so that NaN fails it.
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {str(dtype).removeprefix('torch.')}, found {value!r:.40}")


def checked_indices(name: str, tensor: Tensor, rows: int, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be an integer tensor, found {type(tensor).__name__}")
    if tensor.dtype not in INTEGER_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGER_DTYPES)
        raise ValueError(f"{name} must be a tensor of {known}, found {tensor.dtype}")
    if tensor.shape != (rows,):
        raise ValueError(f"{name} must have shape [{rows}], found {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, query is on {device}")
    return tensor.to(torch.int64)
