"""A batch in the form that the kernels read, and the kernel that scales gradient sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from losses.precision import Precision
from losses.torch_tiles.masks import NegativeMasks


class KernelBatch:
    """A batch in the form that the kernels read, and its block sizes. Ids have been passed through `compact_ids`.

    `set_excluded` adds excluded pairs.
    """

    def __init__(
        self,
        query: Tensor,
        passage: Tensor,
        query_ids: Tensor | None,
        passage_ids: Tensor | None,
        precision: str,
        workspace_bytes: int,
        keep: bool,
    ) -> None:
        from losses.triton.block_sizes import choose_blocks
        from losses.triton.launch import operand, operand_dtype, processors, product_of

        known = cast(Precision, precision)
        self.device = query.device
        self.processors = processors(query.device)
        self.dtype = operand_dtype(query.dtype, known)
        self.width = round_up_to_16_bytes(query.shape[1], self.dtype)
        self.product = product_of(known, self.dtype)
        # Exponentials reach exp(60), beyond float16. Kept ones are rounded, which only bf16 gradients tolerate.
        self.blocks = choose_blocks(
            query.shape[0],
            passage.shape[0],
            self.width,
            self.dtype.itemsize,
            workspace_bytes,
            self.processors,
            keep and precision == "bf16",
        )
        self.query, self.passage = operand(query, known), operand(passage, known)
        self.has_ids = query_ids is not None and passage_ids is not None
        # Placeholders: kernels without ids do not read these pointers.
        self.query_ids = self.passage_ids = self.query
        if query_ids is not None and passage_ids is not None:
            self.query_ids, self.passage_ids = query_ids, passage_ids
        self.has_excluded = False
        # Placeholders: kernels without excluded pairs do not read them.
        self.excluded_arguments: tuple[Any, ...] = (self.query, self.query, 0, 0, 0)
        self.masks: NegativeMasks | None = None
        self._guide_passage: Tensor | None = None

    def set_excluded(self, keys: Tensor, starts: Tensor) -> None:
        """Exclude pairs, sorted by triton/kernels/excluded.py; empty tensors mean none."""
        if not len(keys):
            return
        from losses.triton.kernels.excluded import Cells

        cells = Cells.of(len(self.query), len(self.passage))
        self.has_excluded = True
        self.excluded_arguments = (keys, starts, cells.row_cells, cells.column_cells, cells.cell_bits)

    def set_masks(self, masks: NegativeMasks, guide_passage: Tensor | None) -> None:
        """Mask positives and what `masks` says; `guide_passage` [N, G] are the guide's operands of the passages."""
        self.masks, self._guide_passage = masks, guide_passage

    def mask_arguments(self, rows: slice, columns: slice, shape: Any) -> tuple[Any, ...]:
        """Descriptors of the guide's operands in a block, limits of the guide and limits, for the tile kernels."""
        masks, guide = self.masks, self._guide_passage
        if masks is None:
            return (self.query,) * 4
        arguments: list[Any] = [self.query, self.query, masks.guide_limit, masks.limit]
        if guide is not None and masks.guide_query is not None:
            arguments[0] = self.descriptor(masks.guide_query[rows], shape.block_m, shape.block_k)
            arguments[1] = self.descriptor(guide[columns], shape.block_n, shape.block_k)
        # Placeholders for limits that are not given; kernels do not read them.
        return tuple(self.query if each is None else each for each in arguments)

    @property
    def mask_options(self) -> dict[str, Any]:
        """Keyword arguments of the tile kernels that go with `mask_arguments`."""
        masks = self.masks
        guide = masks.guide_query if masks is not None else None
        return {
            "NEGATIVES": masks is not None,
            "HAS_LIMIT": masks is not None and masks.limit is not None,
            "HAS_GUIDE": guide is not None,
            "G": 0 if guide is None else guide.shape[1],
        }

    def shape(self, kernel: str) -> Any:
        """The tile shape of a kernel."""
        from losses.triton.shapes import tile_shape

        shape = tile_shape(kernel, self.width, self.dtype, self.product, self.device)
        guide = None if self.masks is None else self.masks.guide_query
        if kernel == "gradient" and guide is not None and min(self.width, guide.shape[1]) < WIDE:
            # Larger tiles leave no shared memory for a second product whose loop is as short as this.
            shape = replace(shape, block_m=min(shape.block_m, 128), block_n=min(shape.block_n, 128))
        return shape

    def descriptor(self, matrix: Tensor, rows: int, columns: int) -> Any:
        """Tensor descriptor of [rows, columns] blocks; reads beyond the matrix give zeros, writes there are dropped."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def sorted_excluded(pairs: Tensor | None, query: Tensor, passage: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Excluded pairs [R, 2] in the form of `KernelBatch.set_excluded`; `options` are those of `sorted_pairs`."""
    if pairs is None or not len(query) or not len(passage):
        return query.new_empty(0, dtype=torch.int64), query.new_empty(0, dtype=torch.int32)
    from losses.triton.kernels.excluded import sorted_pairs

    return sorted_pairs(pairs, len(query), len(passage), **options)


def compact_ids_if_given(query_ids: Tensor | None, passage_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`compact_ids` of both ids, or the arguments if either is None or both are int32, that is, compact already."""
    from losses.triton.launch import compact_ids

    if query_ids is None or passage_ids is None or query_ids.dtype == passage_ids.dtype == torch.int32:
        return query_ids, passage_ids
    return compact_ids(query_ids, passage_ids)


# Embeddings and guides from this width on fit the shared memory together with the largest tiles of the table.
WIDE = 384


@dataclass(frozen=True)
class GradientEpilogue:
    """Scales sums of M · dS products to gradients; returns partial sums of the gradient of logit_scale."""

    width: int
    """Columns of the sums and of the embeddings."""
    logit_scale: Tensor
    ds_scale: Tensor
    upstream: Tensor
    divisor: float
    """Divides the upstream gradient: M, or M / W over W ranks."""

    def __call__(self, sums: Tensor, embeddings: Tensor, out: Tensor, scale: bool) -> Tensor:
        import triton

        from losses.triton.kernels.gradients import gradient_epilogue_kernel

        rows = 8 if sums.is_cuda else 64
        partials = sums.new_empty(triton.cdiv(len(sums), rows))
        gradient_epilogue_kernel[(len(partials),)](
            sums,
            embeddings,
            out,
            self.logit_scale,
            self.ds_scale,
            self.upstream,
            partials,
            self.divisor,
            len(sums),
            D=out.shape[1],
            WIDTH=self.width,
            BLOCK_ROWS=rows,
            BLOCK_D=256,
            SCALE=scale,
        )
        return partials


def choose_ds_scale(dtype: torch.dtype, positive_count: Tensor | None, like: Tensor) -> Tensor:
    """The power of two that dS is multiplied by, so that it does not underflow in float16.

    Other dtypes use 1. Most probabilities are below the smallest float16 value, 6e-8. |M · dS| is at most 1, or half
    the largest number of queries that share a positive. 2^15 is the largest power of two in float16.
    """
    if dtype != torch.float16:
        return like.new_ones(())
    if positive_count is None:
        return like.new_full((), 2.0**15)
    return torch.exp2(15 - positive_count.max().clamp(min=1).log2().ceil())


def round_up_to_16_bytes(count: int, dtype: torch.dtype) -> int:
    """The smallest number of elements, at least `count`, whose size is a multiple of 16 bytes."""
    from losses.triton.block_sizes import round_up

    return round_up(count, 16 // dtype.itemsize)


def span_length(span: slice) -> int:
    """Number of elements of a slice."""
    return span.stop - span.start
