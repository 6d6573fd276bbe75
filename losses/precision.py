"""Precision of the matrix products: the dtype of their operands, with float32 or float64 accumulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.checks import accumulator_dtype, check_choice

Precision = Literal["auto", "fp32", "tf32", "bf16"]


def resolve_precision(precision: Precision, query: Tensor) -> Precision:
    """Replace "auto" by the precision of the inputs, or of the surrounding autocast region.

    bfloat16 gives "bf16". float16 gives "tf32", which represents every float16 number exactly. float32 gives "tf32" if
    the user allowed it for CUDA products, otherwise "fp32". float64 embeddings are computed in float64 and accept
    "auto" only.

    Raises:
        ValueError: If `precision` is unknown or does not apply to float64 embeddings.
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


def round_operand(block: Tensor, precision: Precision) -> Tensor:
    """Round a block to the operand precision and convert it to the accumulator dtype."""
    wide = accumulator_dtype(block.dtype)
    if precision == "bf16" and block.dtype != torch.bfloat16:
        block = block.to(torch.bfloat16)
    return block.to(wide)


@contextlib.contextmanager
def matmul_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Disable autocast, and allow tf32 in CUDA's float32 products only if `precision` is "tf32".

    Both settings are restored on exit.
    """
    # Settings that already have the right value are not changed: setting them costs a tenth of a small batch's time.
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

    CUDA multiplies bf16 operands natively and accumulates in float32. The CPU's bf16 product returns bf16 (steps of
    0.25 near a logit of 50), so on a CPU operands are rounded to bf16 and multiplied in float32. The scores are the
    same, and this is faster on processors without bf16 units.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.precision = precision
        self.native_bf16 = precision == "bf16" and device.type == "cuda"

    def operand(self, block: Tensor) -> Tensor:
        """Convert embeddings [rows, D] to the operand dtype."""
        return block.to(torch.bfloat16) if self.native_bf16 else round_operand(block, self.precision)

    def factor(self, tile: Tensor) -> Tensor:
        """Convert a tile of score gradients to the operand dtype for `add_product`."""
        return tile.to(torch.bfloat16) if self.native_bf16 else tile

    def scores(self, query: Tensor, passage: Tensor, out: Tensor) -> Tensor:
        """out [m, n] = query [m, D] @ passage [n, D]ᵀ."""
        if self.native_bf16:
            return torch.mm(query, passage.T, out_dtype=torch.float32, out=out)
        return torch.mm(query, passage.T, out=out)


@dataclass(frozen=True)
class GradientSums:
    """Sums of products of score gradients with embeddings: M · dS K for queries, M · dSᵀ Q for passages.

    Attributes:
        query: [M, width], or None if it is not wanted.
        passage: [N, width], or None.
        overwrite_query, overwrite_passage: Whether the next product replaces what the sum holds.
    """

    query: Tensor | None
    passage: Tensor | None
    overwrite_query: bool
    overwrite_passage: bool = True

    def block(self, rows: slice, columns: slice) -> GradientSums:
        """The sums of queries `rows` and passages `columns`, which the first block of each may overwrite."""
        return GradientSums(
            None if self.query is None else self.query[rows],
            None if self.passage is None else self.passage[columns],
            self.overwrite_query and not columns.start,
            self.overwrite_passage and not rows.start,
        )

    def columns(self, columns: slice) -> GradientSums:
        """The same sums for some of the dimensions."""
        query, passage = (None if each is None else each[:, columns] for each in (self.query, self.passage))
        return GradientSums(query, passage, self.overwrite_query, self.overwrite_passage)

    def cleared(self) -> GradientSums:
        """The same sums, set to zero where they would be overwritten."""
        for each, overwrite in ((self.query, self.overwrite_query), (self.passage, self.overwrite_passage)):
            if each is not None and overwrite:
                each.zero_()
        return GradientSums(self.query, self.passage, False, False)

    def add(self, gradient: Tensor, query: Tensor, passage: Tensor) -> None:
        """Add the products of a block's score gradients [M, N] with its embeddings."""
        if self.query is not None:
            add_product(self.query, gradient, passage, first=self.overwrite_query)
        if self.passage is not None:
            add_product(self.passage, gradient.T, query, first=self.overwrite_passage)


def add_product(target: Tensor, factor: Tensor, block: Tensor, *, first: bool = False) -> None:
    """target [a, D] += factor [a, b] @ block [b, D], in place; with `first`, target is overwritten instead."""
    beta = 0 if first else 1
    if target.device.type == "cpu":
        # The CPU has no half-precision product that accumulates in float32.
        factor, block = factor.to(target.dtype), block.to(target.dtype)
    if factor.dtype == target.dtype:
        target.addmm_(factor, block, beta=beta)
    else:
        torch.addmm(target, factor, block, beta=beta, out_dtype=target.dtype, out=target)
