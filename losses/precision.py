"""How block products are computed: their operands' precision, always with a wide accumulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from losses.inputs import accumulator, check_choice

Precision = Literal["auto", "fp32", "tf32", "bf16"]


def resolve_precision(precision: Precision, query: Tensor) -> Precision:
    """Turn "auto" into the precision of the inputs, or of the autocast region around the caller.

    bfloat16 -> "bf16". float16 -> "tf32", which holds every float16 number exactly. float32 -> "tf32" where the user
    allowed it for CUDA products, otherwise "fp32". float64 is computed in float64 and takes "auto" only.
    """
    check_choice("precision", precision, Precision)
    if query.dtype == torch.float64:
        if precision != "auto":
            raise ValueError(f"precision {precision!r} does not apply to float64 embeddings: leave it at 'auto'")
        return precision
    if precision != "auto":
        return precision
    dtype, device = query.dtype, query.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.bfloat16:
        return "bf16"
    allowed = device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float16 or allowed else "fp32"


def rounded(block: Tensor, precision: Precision) -> Tensor:
    """The block as a product with `precision` reads it, held in the accumulator's dtype."""
    wide = accumulator(block.dtype)
    if precision == "bf16" and block.dtype != torch.bfloat16:
        block = block.to(torch.bfloat16)
    return block.to(wide)


@contextlib.contextmanager
def plain_arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Autocast is off inside and CUDA's float32 products are tf32 only if `precision` says so; restored afterwards."""
    # Switches that are as they should be are left alone: turning them takes a small batch a tenth of its time.
    switched = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if switched else contextlib.nullcontext():
        if device.type != "cuda" or precision == "bf16":
            yield
            return
        backend = torch.backends.cuda.matmul
        before = backend.fp32_precision
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = before


class BlockProducts:
    """Products of blocks with float32 accumulation (float64 for float64 embeddings).

    CUDA multiplies bf16 operands natively and accumulates them in float32. The CPU has no such product (its bf16
    product returns bf16, steps of 0.25 near a logit of 50), so there operands are rounded to bf16 and multiplied in
    float32: the same scores, and faster on processors without bf16 units.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.precision = precision
        self.native_bf16 = precision == "bf16" and device.type == "cuda"

    def operand(self, block: Tensor) -> Tensor:
        """[rows, D] embeddings as the products read them."""
        return block.to(torch.bfloat16) if self.native_bf16 else rounded(block, self.precision)

    def factor(self, tile: Tensor) -> Tensor:
        """A tile of score gradients as `add_product` reads it."""
        return tile.to(torch.bfloat16) if self.native_bf16 else tile

    def scores(self, query: Tensor, passage: Tensor, out: Tensor) -> Tensor:
        """out [m, n] = query [m, D] · passage [n, D]ᵀ."""
        if self.native_bf16:
            return torch.mm(query, passage.T, out_dtype=torch.float32, out=out)
        return torch.mm(query, passage.T, out=out)


def add_product(target: Tensor, factor: Tensor, block: Tensor, *, first: bool = False) -> None:
    """target [a, D] += factor [a, b] · block [b, D] in place; with `first`, target is overwritten."""
    beta = 0 if first else 1
    if target.device.type == "cpu":
        # The CPU has no product of half precision that accumulates in float32.
        factor, block = factor.to(target.dtype), block.to(target.dtype)
    if factor.dtype == target.dtype:
        target.addmm_(factor, block, beta=beta)
    else:
        torch.addmm(target, factor, block, beta=beta, out_dtype=target.dtype, out=target)
