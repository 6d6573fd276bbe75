"""Whether the kernels can run, and the form of their inputs: operand dtype, alignment, int32 ids."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from losses.precision import Precision
from losses.triton.block_sizes import round_up

# The tile kernels need tensor descriptors; the dense kernels read by plain pointers.
MIN_CAPABILITY_FUSED, MIN_CAPABILITY_DENSE = (9, 0), (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_fused(query: Tensor) -> str | None:
    """Why the tile kernels cannot run on these embeddings, in a few words; None if they can."""
    return _why_not(query, MIN_CAPABILITY_FUSED)


def why_not_dense(query: Tensor) -> str | None:
    """Why the dense kernels cannot run on these embeddings; None if they can."""
    return _why_not(query, MIN_CAPABILITY_DENSE)


def _why_not(query: Tensor, min_capability: tuple[int, int]) -> str | None:
    if query.dtype == torch.float64:
        return "the embeddings are float64, which its kernels do not support"
    return why_not_on(query.device, interpreted(), min_capability)


@functools.cache
@torch.compiler.assume_constant_result  # Called during tracing only, not in the graph.
def warn_fallback(implementation: str, reason: str) -> None:
    """Warn once why the requested kernels cannot run."""
    warnings.warn(f"implementation {implementation!r} falls back to 'chunked': {reason}", stacklevel=3)


@functools.cache
def why_not_on(device: torch.device, interpreted: bool, min_capability: tuple[int, int]) -> str | None:
    """Why kernels that need `min_capability` cannot run on a device; None if they can."""
    try:
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return "triton 3.6 or newer is not installed: pip install 'dense-retriever[gpu]'"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"the embeddings are on {device.type}, and its kernels run on CUDA"
    if torch.version.hip is not None:
        return "the device is of ROCm, and its kernels run on CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < min_capability:
        needed, found = (".".join(map(str, version)) for version in (min_capability, capability))
        return f"it needs a GPU of compute capability {needed} or newer, found {found}"
    return None


def operand_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """Dtype of the operands for embeddings of a dtype. The interpreter has no bf16 arithmetic and uses float32."""
    if precision == "bf16":
        return torch.float32 if interpreted() else torch.bfloat16
    return torch.float16 if precision == "tf32" and dtype == torch.float16 else torch.float32


def operand(embeddings: Tensor, precision: Precision) -> Tensor:
    """Convert embeddings [rows, D] to contiguous operands [rows, width].

    `width` is D rounded up to 16 bytes; the padding is zero. Under "tf32", float32 embeddings are rounded to tf32's 10
    bits, because tensor cores would truncate them.
    """
    dtype = operand_dtype(embeddings.dtype, precision)
    if precision == "bf16":
        embeddings = embeddings.to(torch.bfloat16)
    elif precision == "tf32" and embeddings.dtype == torch.float32:
        bits = embeddings.contiguous().view(torch.int32).add(0x1000).bitwise_and_(~0x1FFF)
        embeddings = torch.where(embeddings.isfinite(), bits.view(torch.float32), embeddings)
    embeddings = embeddings.to(dtype)
    width = round_up(embeddings.shape[1], 16 // dtype.itemsize)
    if width != embeddings.shape[1]:
        embeddings = torch.nn.functional.pad(embeddings, (0, width - embeddings.shape[1]))
    embeddings = embeddings.contiguous()
    # Descriptors need 16-byte alignment, which a slice of a larger tensor may not have.
    return embeddings if embeddings.data_ptr() % 16 == 0 else embeddings.clone()


def product_of(precision: Precision, dtype: torch.dtype) -> str:
    """Triton's `input_precision` for the products of these operands."""
    if dtype != torch.float32 or interpreted():
        return "ieee"
    # Three tf32 products of split operands reach float32 accuracy on tensor cores.
    return "tf32" if precision == "tf32" else "tf32x3"


def compact_ids(query_ids: Tensor, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Map ids [M] and [N] to int32, preserving equality; −1 for a query id that no passage has."""
    ordered = passage_ids.sort().values
    of_query = torch.searchsorted(ordered, query_ids)
    known = ordered[of_query.clamp(max=len(ordered) - 1)] == query_ids
    return torch.where(known, of_query, -1).int(), torch.searchsorted(ordered, passage_ids).int()


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
