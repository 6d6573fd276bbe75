"""Frozen passages: e_i = log Σ_f exp(logit_scale · q_i · k_f), from one pass over the blocks of frozen passages.

The gradient needs only the mean of the passages under the softmax, m_i = Σ_f exp(S_if − e_i) k_f, which forward
accumulates beside the sums as attention does (Dao et al., arXiv 2205.14135):

    dq_i = logit_scale · g_i m_i      d logit_scale = Σ_i g_i q_i · m_i

So frozen passages are read once a step, in two matrix products; backward does not need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.checks import accumulator_dtype, all_finite
from losses.negatives.streaming import FrozenPassages
from losses.precision import BlockProducts, Precision, add_product, matmul_precision, round_operand

# Rows of queries whose products with the means are summed at once, for the gradient of logit_scale.
SCALE_ROWS = 8192


@dataclass(frozen=True)
class FrozenTerm:
    """How the term is computed.

    Attributes:
        passages: The frozen passages.
        excluded: [R, 2] int64 pairs (query row, frozen row), or None.
        bounds: [4], bounds of the pool's scores (triton/kernels/bounds.py) if Triton kernels compute, otherwise None.
    """

    passages: FrozenPassages
    excluded: Tensor | None
    bounds: Tensor | None
    precision: Precision
    workspace_bytes: int


def frozen_term(query: Tensor, logit_scale: Tensor, term: FrozenTerm) -> Tensor:
    """[M] log-sum-exps; differentiable once with respect to query and logit_scale.

    In addition to the workspace it uses [M, D] numbers in the accumulator dtype if a gradient is needed.
    """
    differentiable = torch.is_grad_enabled() and (query.requires_grad or logit_scale.requires_grad)
    return _FrozenTerm.apply(query, logit_scale, term, differentiable)


class _FrozenTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, logit_scale: Tensor, term: FrozenTerm, differentiable: bool) -> Tensor:
        if not len(query) or not term.passages.rows:
            log_sum = query.new_full((len(query),), -torch.inf, dtype=accumulator_dtype(query.dtype))
            mean = torch.zeros(query.shape, dtype=log_sum.dtype, device=query.device)
        elif term.bounds is None:
            with matmul_precision(term.precision, query.device):
                log_sum, mean = _sums_and_means(query, logit_scale, term, differentiable)
        else:
            from losses.negatives.triton_frozen import frozen_sums_and_means

            log_sum, mean = frozen_sums_and_means(
                query,
                logit_scale,
                term.passages,
                term.excluded,
                term.bounds,
                term.precision,
                term.workspace_bytes,
                differentiable,
            )
        ctx.save_for_backward(query, logit_scale, mean)
        ctx.precision = term.precision
        return log_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negatives.frozen is differentiable once: implementation='full' has second derivatives")
        query, logit_scale, mean = ctx.saved_tensors
        want_query, want_scale = ctx.needs_input_grad[:2]
        of_query, of_scale = torch.empty_like(query) if want_query else None, upstream.new_zeros(())
        if want_scale:
            parts = (each.split(SCALE_ROWS) for each in (query, upstream, mean))
            for rows, weight, means in zip(*parts, strict=True):
                of_scale += ((round_operand(rows, ctx.precision) * means).sum(1) * weight).sum()
        if of_query is not None:
            torch.mul(mean, (upstream * logit_scale)[:, None], out=of_query)
        return of_query, of_scale if want_scale else None, None, None


def _sums_and_means(query: Tensor, logit_scale: Tensor, term: FrozenTerm, want_mean: bool) -> tuple[Tensor, Tensor]:
    """Tiles in PyTorch with running maxima; the means are empty if not wanted."""
    device, dtype = query.device, accumulator_dtype(query.dtype)
    products = BlockProducts(term.precision, device)
    operand = products.operand(query)
    rows, size = _tile_shape(query, term)
    shift = torch.full((len(query),), torch.finfo(dtype).min, dtype=dtype, device=device)
    total = torch.zeros_like(shift)
    mean = torch.zeros(*query.shape, dtype=dtype, device=device) if want_mean else total.new_empty(0)
    buffer = torch.empty(rows * size + 1, dtype=dtype, device=device)
    finite = total.new_ones((), dtype=torch.bool)
    for first, block in term.passages.blocks(device, size):
        finite &= all_finite(block)
        passage = products.operand(block.to(query.dtype))
        for start in range(0, len(query), rows):
            span = slice(start, min(start + rows, len(query)))
            height = span.stop - start
            tile = buffer[: height * len(block)].view(height, len(block))
            products.scores(operand[span], passage, tile).mul_(logit_scale)
            if term.excluded is not None:
                _exclude(buffer, (height, len(block)), term.excluded, start, first)
            before = shift[span].clone()
            torch.maximum(before, tile.amax(1), out=shift[span])
            factor = (before - shift[span]).exp_()
            tile.sub_(shift[span, None]).exp_()
            total[span].mul_(factor).add_(tile.sum(1))
            if want_mean:
                mean[span].mul_(factor[:, None])
                add_product(mean[span], products.factor(tile), passage)
    if want_mean:
        mean.div_(torch.where(total > 0, total, 1)[:, None])
    # A score of minus infinity adds zero to every sum, so the passages themselves are checked.
    return torch.where(finite, shift + total.log(), torch.nan), mean


def _tile_shape(query: Tensor, term: FrozenTerm) -> tuple[int, int]:
    """Queries and frozen passages of a tile; both and a block of passages, held up to four times, fit the workspace."""
    width = torch.finfo(accumulator_dtype(query.dtype)).bits // 8
    per_passage = 4 * width * query.shape[1]
    rows = min(len(query), 1024)
    # A tile, and its copy in the operand dtype on a GPU.
    size = max(1, term.workspace_bytes // (per_passage + 2 * width * rows))
    if query.device.type == "cpu":
        # A larger tile does not speed up the products and no longer fits in the cache.
        size = min(size, max(1, (1 << 20) // rows))
    return rows, min(size, term.passages.rows)


def _exclude(buffer: Tensor, shape: tuple[int, int], pairs: Tensor, first_row: int, first_column: int) -> None:
    """Minus infinity at the pairs inside the tile of this shape at the beginning of the buffer.

    Pairs outside are written to the spare entry at the end: selecting those inside would synchronize with the device.
    """
    row, column = pairs[:, 0] - first_row, pairs[:, 1] - first_column
    inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    buffer.index_fill_(0, torch.where(inside, row * shape[1] + column, len(buffer) - 1), -torch.inf)
