"""Frozen passages by Triton kernels: row sums and means under the softmax from one pass over blocks of passages.

For each block, the kernel of forward (triton/kernels/statistics.py) adds to the row sums and keeps the exponentials,
which cuBLAS multiplies by the passages of the block: two products in all. Where one shift is not safe, the
exponentials are recomputed from running maxima, which takes a third product. Nothing synchronizes with the device
except waiting for a host tensor that is not pinned.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from losses.negatives.streaming import FrozenPassages
from losses.precision import Precision, add_product, matmul_precision
from losses.triton.block_launches import SavedStatistics, ScoreGradientWeights, add_sums, score_gradient
from losses.triton.kernel_batch import KernelBatch, round_up_to_16_bytes, sorted_excluded, span_length

# Queries of a tile of exponentials.
MAX_ROWS = 8192
# Sizes of blocks are multiples of this, so that tiles are whole.
BLOCK_MULTIPLE = 2048
# Squared lengths may exceed those of the pool by this factor before running maxima are used.
LENGTH_MARGIN = 1.1


def frozen_sums_and_means(
    query: Tensor,
    logit_scale: Tensor,
    passages: FrozenPassages,
    excluded: Tensor | None,
    bounds: Tensor,
    precision: str,
    workspace_bytes: int,
    want_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps [M] to the base e, and means [M, D] in float32, empty if not wanted.

    Args:
        bounds: [4], bounds of the scores in the pool, as the backend of the pool has set them.
    """
    from losses.triton.block_sizes import spans
    from losses.triton.launch import operand

    if query.dtype == torch.float16:
        # Exponentials exceed float16; tf32 represents every float16 number.
        query, precision = query.float(), "tf32" if precision != "bf16" else precision
    known = cast(Precision, precision)
    rows_operand = operand(query, known)
    (queries, width), device = rows_operand.shape, query.device
    state = _State(queries, width, bounds, want_mean)
    height = min(queries, MAX_ROWS)
    size = _block_rows(passages, device, height, rows_operand, query.shape[1], workspace_bytes)
    workspace = rows_operand.new_empty(height * round_up_to_16_bytes(size, rows_operand.dtype) if want_mean else 0)
    with matmul_precision(known, device):
        for first, stored in passages.blocks(device, size):
            # Stored operands need no conversion by way of the query's dtype, which may be wider.
            block = operand(stored if stored.dtype == rows_operand.dtype else stored.to(query.dtype), known)
            state.check(block)
            for rows in spans(0, queries, height):
                pairs = None if excluded is None else _relative(excluded, rows.start, first)
                batch = KernelBatch(rows_operand[rows], block, None, None, precision, workspace_bytes, False)
                batch.set_excluded(*sorted_excluded(pairs, batch.query, block))
                state.add(batch, rows, logit_scale, workspace, workspace_bytes)
    total = state.total
    log_sum = torch.where(total == 0, -torch.inf, (state.shift + total.log2()) * math.log(2))
    log_sum = torch.where(state.bounds[3] > 0, torch.nan, log_sum)
    mean = state.mean.div_(torch.where(total == 0, 1, total)[:, None]) if want_mean else state.mean
    return log_sum, mean[:, : query.shape[1]] if want_mean else mean


class _State:
    """Row sums, and sums of passages weighted by exponentials, over the blocks so far."""

    def __init__(self, queries: int, width: int, bounds: Tensor, want_mean: bool) -> None:
        self.bounds = bounds.clone()
        self.bounds[1] *= LENGTH_MARGIN
        self.total, self.shift, self._score, self._ones = bounds.new_zeros(4, queries)
        self._ones += 1
        self._before = bounds.new_full((queries,), -torch.inf)
        self._nowhere = torch.full((queries,), -1, dtype=torch.int64, device=bounds.device)
        self.mean = bounds.new_zeros(queries if want_mean else 0, width)

    def check(self, block: Tensor) -> None:
        """Note whether a block has longer passages than one shift allows, or values that are not finite."""
        from losses.triton.kernels.frozen import check_block_kernel

        rows = 32
        check_block_kernel[(-(-len(block) // rows),)](
            block, self.bounds, len(block), D=block.shape[1], BLOCK_ROWS=rows, BLOCK_D=128
        )

    def add(
        self, batch: KernelBatch, rows: slice, logit_scale: Tensor, workspace: Tensor, workspace_bytes: int
    ) -> None:
        """Add a block of passages for the queries `rows`."""
        from losses.triton.block_sizes import Blocks
        from losses.triton.kernels.frozen import rescale_means_kernel

        (height, columns), width = (span_length(rows), len(batch.passage)), batch.width
        want_mean = len(self.mean) > 0
        exponentials = None
        if want_mean:
            batch.blocks = Blocks(height, columns, kept_rows=height)
            stride = round_up_to_16_bytes(columns, batch.dtype)
            exponentials = workspace[: height * stride].view(height, stride)[:, :columns]
        total, shift, score, nowhere = (each[rows] for each in (self.total, self.shift, self._score, self._nowhere))
        # There are no columns to sum.
        statistics = SavedStatistics(self.bounds, score, total, shift, total, shift)
        add_sums(batch, statistics, logit_scale, nowhere, False, False, workspace_bytes, exponentials)
        programs = 8 if total.is_cuda else 64
        rescale_means_kernel[(-(-height // programs),)](
            self.bounds,
            logit_scale,
            self._before[rows],
            shift,
            total,
            self.mean[rows] if want_mean else total,
            height,
            D=width if want_mean else 0,
            BLOCK_ROWS=programs,
            BLOCK_D=128,
        )
        if exponentials is None:
            return
        ones = self._ones[rows]
        weights = ScoreGradientWeights(ones[0], ones, ones, symmetric=False, diagonal=False)
        whole = slice(0, height), slice(0, columns)
        score_gradient(batch, statistics, weights, logit_scale, nowhere, *whole, exponentials, variants=(False,))
        if batch.product == "tf32":
            # Round to tf32's 10 bits: tensor cores would truncate.
            bits = exponentials.view(torch.int32)
            bits.add_(0x1000).bitwise_and_(~0x1FFF)
        add_product(self.mean[rows], exponentials, batch.passage)


def _relative(pairs: Tensor, first_row: int, first_column: int) -> Tensor:
    # Subtracting a tensor of both numbers would copy it from the host and wait for it.
    rows, columns = pairs.unbind(1)
    return torch.stack([rows - first_row, columns - first_column], 1)


def _block_rows(
    passages: FrozenPassages, device: torch.device, height: int, operand: Tensor, dim: int, workspace_bytes: int
) -> int:
    """Passages of a block: exponentials, buffers and a converted copy fit the workspace."""
    per_row = height * operand.element_size()
    if not passages.on(device):
        per_row += 2 * dim * passages.itemsize()
    same = isinstance(passages.source, Tensor) and passages.source.dtype == operand.dtype
    if not same or dim != operand.shape[1]:
        per_row += operand.shape[1] * operand.element_size()
    size = workspace_bytes // per_row
    return max(16, min(size // BLOCK_MULTIPLE * BLOCK_MULTIPLE or size, passages.rows))
