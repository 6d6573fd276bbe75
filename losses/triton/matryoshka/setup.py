"""What the Matryoshka kernels are launched with: the layout of the operands, tile shapes, and a block of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.option_checks.objective import Prefixes
from losses.precision import Precision
from losses.triton.kernel_batch import KernelBatch
from losses.triton.launch import operand_dtype, product_of
from losses.triton.matryoshka.layout import PrefixLayout
from losses.triton.shapes import TileShape, tile_shape


@dataclass(frozen=True)
class MatryoshkaSetup:
    """The kernels' constants for embeddings of one dimension, dtype and precision.

    Attributes:
        prefixes: Sizes of the prefixes.
        dimensions: D, the size of the embeddings.
        layout: Where the prefixes are in the operands.
        product: Triton's `input_precision`.
        shapes: The tile shape of each kernel.
    """

    own_products_bytes: ClassVar[int] = 2
    """Largest operand, in bytes, whose slices our own kernel multiplies; cuBLAS multiplies larger ones."""
    sums_registers: ClassVar[int | None] = 168
    """Registers per thread of the forward kernel for operands in half precision, so that three programs fit on a
    multiprocessor; None leaves them to the compiler."""
    gradient_registers: ClassVar[int | None] = 168
    """The same for the backward kernel."""

    prefixes: Prefixes
    dimensions: int
    layout: PrefixLayout
    product: str
    shapes: dict[str, TileShape]

    @classmethod
    def of(cls, prefixes: Prefixes, query: Tensor, precision: Precision) -> MatryoshkaSetup:
        """The setup for embeddings like `query` [M, D]."""
        dtype = operand_dtype(torch.float32 if query.dtype == torch.float16 else query.dtype, precision)
        dimensions, product = query.shape[1], product_of(precision, dtype)
        shapes = {
            name: tile_shape(name, dimensions, dtype, product, query.device)
            for name in ("prefix_sums", "prefix_gradient", "prefix_products")
        }
        step = min(shapes[name].block_k for name in ("prefix_sums", "prefix_gradient"))
        return cls(prefixes, dimensions, PrefixLayout.of(prefixes, step), product, shapes)

    def operands(self, kernel_batch: KernelBatch, rows: slice, columns: slice, shape: TileShape) -> list[Any]:
        """Descriptors of a block's queries and passages."""
        return [
            kernel_batch.descriptor(kernel_batch.query[rows], shape.block_m, self.layout.step),
            kernel_batch.descriptor(kernel_batch.passage[columns], shape.block_n, self.layout.step),
        ]

    def slices(self) -> dict[str, tuple[int, ...]]:
        """Constants of the kernels: the slices in the packed operands."""
        return {"STARTS": self.layout.starts, "ENDS": self.layout.ends}

    def tile_options(self, shape: TileShape) -> dict[str, Any]:
        """Constants of the kernels that visit all pairs, and how they are launched."""
        return {
            **self.slices(),
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_K": self.layout.step,
            "GROUP": shape.group,
            "PRODUCT": self.product,
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }


@dataclass(frozen=True)
class PrefixBlock:
    """A block of scores of all prefixes.

    Attributes:
        kernel_batch: Packed queries and passages of the block, its ids and excluded pairs.
        query_inverse, passage_inverse: Inverse lengths of their prefixes, [prefixes, M] and [prefixes, N].
        bounds: [4], as in `SavedStatistics`.
        positive: [M], relative to the passages of the block.
        diagonal: Whether the positives are the passages of the block in order; then they are not read.
    """

    kernel_batch: KernelBatch
    query_inverse: Tensor
    passage_inverse: Tensor
    bounds: Tensor
    logit_scale: Tensor
    positive: Tensor
    diagonal: bool
    symmetric: bool

    def options(self) -> dict[str, bool]:
        """Constants of the kernels that visit all pairs."""
        return {
            "SYMMETRIC": self.symmetric,
            "DIAGONAL": self.diagonal,
            "HAS_IDS": self.kernel_batch.has_ids,
            "HAS_EXCLUDED": self.kernel_batch.has_excluded,
        }


def sum_sizes(height: int, width: int, shape: TileShape) -> tuple[int, int]:
    """Number of row sums and of column sums of all tiles of a block, for one prefix."""
    return height * -(-width // shape.block_n), width * -(-height // shape.block_m)
