"""Where the kernels can kernel_batch, and what they read: operands in one precision, descriptors, ids as small integers."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from losses.precision import Precision
from losses.triton.block_sizes import round_up

# Tiles arrive by tensor-memory descriptors; the whole matrix is read by plain pointers.
MIN_CAPABILITY_FUSED, MIN_CAPABILITY_DENSE = (9, 0), (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_fused(query: Tensor) -> str | None:
    """What keeps the tiles' kernels from these embeddings, in a few words; None where they kernel_batch."""
    return _why_not(query, MIN_CAPABILITY_FUSED)


def why_not_dense(query: Tensor) -> str | None:
    """The same of the kernels of the whole matrix."""
    return _why_not(query, MIN_CAPABILITY_DENSE)


def _why_not(query: Tensor, min_capability: tuple[int, int]) -> str | None:
    if query.dtype == torch.float64:
        return "the embeddings are float64, which it has no products for"
    return why_not_on(query.device, interpreted(), min_capability)


@functools.cache
@torch.compiler.assume_constant_result  # While a graph is compiled it is called once, and is no part of it.
def warn_fallback(implementation: str, reason: str) -> None:
    """Say once why the kernels that were asked for do not kernel_batch."""
    warnings.warn(f"implementation {implementation!r} steps down to 'chunked': {reason}", stacklevel=3)


@functools.cache
def why_not_on(device: torch.device, interpreted: bool, min_capability: tuple[int, int]) -> str | None:
    """The same of any embeddings on a device."""
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
    """What embeddings of a dtype are multiplied in. The interpreter has no bf16 arithmetic: float32 there."""
    if precision == "bf16":
        return torch.float32 if interpreted() else torch.bfloat16
    return torch.float16 if precision == "tf32" and dtype == torch.float16 else torch.float32


def operand(embeddings: Tensor, precision: Precision) -> Tensor:
    """[rows, D] -> [rows, W] contiguous, as the tensor cores read it; W is D up to the next 16 bytes, zeros beyond.

    float32 embeddings under "tf32" are rounded to its 10 bits, which the tensor cores would merely cut off.
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
    # A slice of a larger tensor may begin anywhere; descriptors need 16 bytes.
    return embeddings if embeddings.data_ptr() % 16 == 0 else embeddings.clone()


def product_of(precision: Precision, dtype: torch.dtype) -> str:
    """Triton's name for how operands are multiplied; those of half precision have one way."""
    if dtype != torch.float32 or interpreted():
        return "ieee"
    # Three tf32 products of split operands: the tensor cores' way to float32's accuracy.
    return "tf32" if precision == "tf32" else "tf32x3"


def compact_ids(query_ids: Tensor, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 numbers, equal where the ids [M], [N] are equal; −1 for a query whose id no passage carries."""
    ordered = passage_ids.sort().values
    of_query = torch.searchsorted(ordered, query_ids)
    known = ordered[of_query.clamp(max=len(ordered) - 1)] == query_ids
    return torch.where(known, of_query, -1).int(), torch.searchsorted(ordered, passage_ids).int()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
