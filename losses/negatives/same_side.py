"""Terms within a side: e_i = log Σ_j exp(logit_scale · x_i · x_j) over the rows j of the same side with another id.

The matrix is symmetric, so one process computes only the tiles on and above its diagonal: the sums of a tile's columns
are sums of rows as well. With the upstream gradient g_i and w_i = g_i / exp(e_i), backward multiplies the symmetric
matrix exp(S_ij) (w_i + w_j) by X; of that matrix too, only half is computed. Over ranks, the rows move around as
passages do (distributed/ring.py, distributed/gather.py), and each rank computes its rows in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.blocks import BlockBackend, ColumnSums, GradientFactors, GradientWeights, PassageBlock, RowSums
from losses.distributed.communication import Communication
from losses.distributed.forward_state import ForwardState
from losses.distributed.gather import gather_backward, gather_forward, gathered_pool
from losses.distributed.ring import ring_backward, ring_forward
from losses.distributed.torch_blocks import TorchBackend
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.precision import GradientSums, Precision, matmul_precision
from losses.triton.block_sizes import CUBLAS_TILE_COLUMNS, CUBLAS_TILE_ROWS, round_up, spans

# Rows of a strip on a CPU.
CPU_STRIP = 1024


@dataclass(frozen=True)
class SideRanks:
    """The ranks that hold the rows of a side. `shards` counts these rows as passages."""

    communication: Communication
    shards: Shards
    exchange: Literal["ring", "gather"]


@dataclass(frozen=True)
class Side:
    """How the term is computed.

    Attributes:
        ids: [n] int64, or int32 if they are compact already. Rows with equal ids are left out, so the ids of a side
            without ids are its row numbers.
        needed: In one process, only the first `needed` rows are computed.
        bounds: [4], bounds of all scores of the loss in the form of the backend.
        fused: Whether Triton kernels compute.
        ranks: The other ranks, or None for one process.
    """

    ids: Tensor
    needed: int
    bounds: Tensor
    precision: Precision
    workspace_bytes: int
    fused: bool
    ranks: SideRanks | None


def same_side_term(embeddings: Tensor, logit_scale: Tensor, side: Side) -> Tensor:
    """[needed] log-sum-exps of the rows of this rank; all n rows over ranks.

    Minus infinity for a row without others. Differentiable once with respect to embeddings [n, D] and logit_scale.
    """
    terms = _SameSideTerm.apply(embeddings, logit_scale, side)
    return terms if side.ranks is not None else terms[: side.needed]


class _SameSideTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, logit_scale: Tensor, side: Side) -> Tensor:
        with matmul_precision(side.precision, embeddings.device):
            backend = _backend(embeddings, logit_scale, side, side.ids)
            operand = backend.prepare_passages(embeddings)
            block = PassageBlock(operand, side.ids, 0 if side.ranks is None else side.ranks.shards.first_passage)
            if side.ranks is None:
                rows = RowSums(backend.initial_sums(3, len(embeddings)))
                _add_strips(rows, block, logit_scale, side)
                state = ForwardState(rows, 0, block, block, ColumnSums(rows.table[:, :0]))
            else:
                shards, communication = side.ranks.shards, side.ranks.communication
                forward = ring_forward if side.ranks.exchange == "ring" else gather_forward
                blocks = block if side.ranks.exchange == "ring" else gathered_pool(block, shards, communication)
                state = forward(backend, blocks, _batch(operand, logit_scale, side.ids), shards, communication)
            log_sum = backend.log_sums(state.rows)
            # A row without others has no maximum; backward must not subtract infinities.
            state.rows.shift.copy_(torch.where(state.rows.total > 0, state.rows.shift, 0))
        ctx.save_for_backward(embeddings, logit_scale)
        ctx.backend, ctx.state, ctx.side = backend, state, side
        return log_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negatives.same_side is differentiable once: implementation='full' has more derivatives")
        embeddings, logit_scale = ctx.saved_tensors
        side, state, backend = ctx.side, ctx.state, ctx.backend
        want_embeddings, want_scale = ctx.needs_input_grad[:2]
        with matmul_precision(side.precision, embeddings.device):
            compute = _strip_gradients if side.ranks is None else _rank_gradients
            sums, ds_scale, unit = compute(backend, state, logit_scale, side, upstream)
            dtype = embeddings.dtype if want_embeddings else None
            factors = GradientFactors(ds_scale, unit, 1.0)
            of_embeddings, of_scale = backend.finish_gradient(sums, factors, dtype, want_scale, True)
        # Each score is in the matrix twice, so Σ X ∘ sums counts its gradient twice.
        return of_embeddings, None if of_scale is None else of_scale / 2, None


def _backend(embeddings: Tensor, logit_scale: Tensor, side: Side, ids: Tensor) -> BlockBackend:
    backend_class = TritonBackend if side.fused else TorchBackend
    first = 0 if side.ranks is None else side.ranks.shards.first_passage
    backend: BlockBackend = backend_class(
        _batch(embeddings, logit_scale, ids), side.precision, side.workspace_bytes, first
    )
    backend.set_bounds(side.bounds)
    return backend


def _batch(embeddings: Tensor, logit_scale: Tensor, ids: Tensor) -> ContrastiveBatch:
    # No row has a positive, so the ids mask equal rows and the row itself.
    nowhere = torch.full((len(embeddings),), -1, device=embeddings.device)
    return ContrastiveBatch(embeddings, embeddings[:0], logit_scale, nowhere, ids, ids, symmetric=True)


def _strips(block: PassageBlock, side: Side, waves: int) -> Iterator[slice]:
    """Strips of rows whose tiles from the diagonal on are computed together.

    Whole waves of cuBLAS tiles per strip fill the multiprocessors. Narrow strips compute less below the diagonal; wide
    strips need fewer launches.
    """
    count, width = block.passage.shape
    size = min(CPU_STRIP, max(1, math.isqrt(side.workspace_bytes // 16)))
    if side.fused:
        from losses.triton.launch import processors

        wave = waves * processors(block.passage.device) // -(-width // CUBLAS_TILE_COLUMNS) * CUBLAS_TILE_ROWS
        size = max(CUBLAS_TILE_ROWS, min(wave, round_up(-(-count // 4), CUBLAS_TILE_ROWS)))
    return spans(0, side.needed, size)


def _add_strips(rows: RowSums, block: PassageBlock, logit_scale: Tensor, side: Side) -> None:
    assert block.ids is not None
    for strip in _strips(block, side, waves=2):
        backend = _backend(block.passage[strip], logit_scale, side, block.ids[strip])
        of_strip = RowSums(rows.table[:, strip])
        unused = ColumnSums(backend.initial_sums(4, len(of_strip.shift)))
        backend.accumulate_sums(_rows_of(block, strip), of_strip, unused)
        rest = slice(strip.stop, len(block.passage))
        if rest.start < rest.stop:
            # Sums of columns are sums of the rows of the same number.
            backend.accumulate_sums(_rows_of(block, rest), of_strip, ColumnSums(rows.table[:, rest]))


def _rows_of(block: PassageBlock, rows: slice) -> PassageBlock:
    assert block.ids is not None
    return PassageBlock(block.passage[rows], block.ids[rows], 0)


def _strip_gradients(
    backend: BlockBackend, state: ForwardState, logit_scale: Tensor, side: Side, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [n, width] of ds_scale / unit · dS X, ds_scale and unit."""
    rows, block = state.rows, state.block
    assert block.ids is not None
    weight, ds_scale, unit = _weights(upstream, upstream, rows.total, backend)
    sums = torch.zeros(len(weight), backend.width, dtype=weight.dtype, device=weight.device)
    for strip in _strips(block, side, waves=1):
        strip_backend = _backend(block.passage[strip], logit_scale, side, block.ids[strip])
        of_strip, of_weights = RowSums(rows.table[:, strip]), weight[strip]
        for columns in (strip, slice(strip.stop, len(weight))):
            if columns.start == columns.stop:
                continue
            strip_backend.accumulate_gradients(
                _rows_of(block, columns),
                of_strip,
                rows.shift[columns],
                GradientWeights(of_weights, weight[columns], ds_scale),
                # The tiles on the diagonal contain both entries of each pair.
                GradientSums(sums[strip], None if columns is strip else sums[columns], False, False),
            )
    return sums, ds_scale, unit


def _rank_gradients(
    backend: BlockBackend, state: ForwardState, logit_scale: Tensor, side: Side, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_strip_gradients`, for the rows of this rank against those of all ranks."""
    assert side.ranks is not None
    shards, communication = side.ranks.shards, side.ranks.communication
    everywhere = communication.gather_rows(upstream, shards.passages)
    row, ds_scale, unit = _weights(upstream, everywhere, state.rows.total, backend)
    block = slice(state.block.first, state.block.first + len(state.block.passage))
    column, _, _ = _weights(everywhere[block], everywhere, state.columns.total, backend)
    sums = torch.zeros(len(row), backend.width, dtype=row.dtype, device=row.device)
    backward = ring_backward if side.ranks.exchange == "ring" else gather_backward
    backward(backend, state, GradientWeights(row, column, ds_scale), sums, False, shards, communication)
    return sums, ds_scale, unit


def _weights(
    upstream: Tensor, everywhere: Tensor, total: Tensor, backend: BlockBackend
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [n] of exp(S − shift), at most ds_scale / total, with ds_scale and the unit of the upstream gradient.

    All upstream gradients of a side have one sign, which is part of the unit: the kernels need weights of at least 0.
    """
    largest = torch.cat([everywhere.abs(), everywhere.new_zeros(1)]).max()
    unit = torch.where(largest > 0, largest * torch.where(everywhere.sum() < 0, -1, 1), 1)
    # An entry is the sum of two weighted probabilities.
    ds_scale = backend.choose_ds_scale(unit.new_full((1,), 2.0))
    share = upstream / unit
    return torch.where(share > 0, ds_scale * share / total, 0), ds_scale, unit
