"""Packed columns of embeddings for the Matryoshka kernels: each slice begins at a multiple of the product's step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.option_checks.objective import Prefixes
from losses.precision import Precision
from losses.triton.block_sizes import round_up
from losses.triton.launch import operand

# Padding may add at most this share of the columns before a smaller step is used.
MAX_PADDING = 0.1
MIN_STEP = 16


@dataclass(frozen=True)
class PrefixLayout:
    """Where the slices of the embeddings are in the packed operands.

    Attributes:
        prefixes: Sizes of the prefixes in the embeddings.
        starts, ends: The slices in the packed operands; each ends at a multiple of `step`.
        step: Columns of one step of the product.
    """

    prefixes: Prefixes
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    step: int

    @classmethod
    def of(cls, prefixes: Prefixes, step: int) -> PrefixLayout:
        """The layout with a step of at most `step`, a power of two."""
        sizes = [columns.stop - columns.start for columns in prefixes.slices]
        while step > MIN_STEP and sum(round_up(size, step) for size in sizes) > (1 + MAX_PADDING) * sum(sizes):
            step //= 2
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + round_up(size, step))
        return cls(prefixes, tuple(ends[:-1]), tuple(ends[1:]), step)

    @property
    def width(self) -> int:
        """Columns of the packed operands."""
        return self.ends[-1]

    @property
    def out_starts(self) -> tuple[int, ...]:
        """The slices in the embeddings; they end at `prefixes.dims`."""
        return tuple(columns.start for columns in self.prefixes.slices)

    def tile_columns(self, most: int) -> int:
        """Columns of the output tiles of a product with one slice: the largest power of two that divides all slices.

        At most `most`, a power of two.
        """
        sizes = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        return math.gcd(most, *sizes)

    def pack(self, side: Tensor, precision: Precision) -> Tensor:
        """[rows, width] operands of embeddings [rows, D]; float16 becomes float32.

        Gradients of scores are divided by lengths of embeddings, which would leave the range of float16.
        """
        if side.dtype == torch.float16:
            side = side.float()
        if self.ends == self.prefixes.dims:
            return operand(side[:, : self.width], precision)
        packed = side.new_zeros(len(side), self.width)
        for start, columns in zip(self.starts, self.prefixes.slices, strict=True):
            packed[:, start : start + columns.stop - columns.start] = side[:, columns]
        return operand(packed, precision)
