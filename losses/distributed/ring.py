"""InfoNCE over ranks by a ring: passages move from rank to rank, and no rank stores more than a few shards of them.

Rank r of W holds queries [M_r, D] and passages [N_r, D], block r of the pool. In forward, blocks move to rank + 1: at
step k = 0, …, W − 1, rank r computes block r − k. The column sums follow their block one step behind and are merged
with the sums of each rank. They are complete at rank r − 1, which is the last to compute block r and keeps it.
Backward starts with these kept blocks and moves them to rank − 1: at step k, rank r computes block r + 1 + k, its own
block last. The weights of a block's columns move with it. The sum of its gradient follows one step behind and reaches
the block's own rank when the last step ends.

Every transfer overlaps with the computation of a step and depends on none of that step. Each rank sends the next_block,
for shards of n passages, `width` values per passage in the operand dtype (e bytes each; the kernels pad D to 16
bytes), a bytes per sum (4; 8 in float64), and ids of 8 bytes if given:

    forward      (W − 1) n (width·e + 8 ids + 4a symmetric)      blocks, ids; the four column sums
    backward     (W − 2) n (width·e + 8 ids)                     blocks again, except the kept one and the own one
               + (W − 1) n (width·a + 2a symmetric)              gradients; weights and shifts

and three times a few numbers: sizes, bounds of scores, the loss. The number of hops is minimal: W − 1 other ranks need
a block in forward, W − 1 contribute to its gradient, and W − 2 need it again unless more than one foreign block is
stored. Memory in addition to inputs and gradients: two blocks; in backward also the query sums and three sums of a
block's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.blocks import BlockBackend, ColumnSums, GradientWeights, PassageBlock
from losses.distributed.communication import Communication
from losses.distributed.forward_state import ForwardState
from losses.inputs import ContrastiveBatch
from losses.precision import GradientSums


def ring_forward(
    backend: BlockBackend, own: PassageBlock, batch: ContrastiveBatch, shards: Shards, communication: Communication
) -> ForwardState:
    """Compute all blocks once. The positives of the batch are rows of the pool."""
    state = ForwardState.initial(backend, own.first, own)
    block, columns = own, state.columns
    for step in range(communication.size):
        outgoing: list[Tensor] = []
        incoming: list[Tensor] = []
        next_block = block
        if step < communication.size - 1:
            next_block = receive_buffer(block, (communication.rank - step - 1) % communication.size, shards)
            outgoing, incoming = block.tensors(), next_block.tensors()
        sent_columns = columns
        if batch.symmetric and step:
            received = columns.table.new_empty(*columns.table.shape[:-1], len(block.passage))
            outgoing, incoming = [*outgoing, sent_columns.table], [*incoming, received]
        wait = communication.start_exchange(outgoing, incoming, 1)
        columns = state.add_block(backend, block, batch)
        wait()
        if batch.symmetric and step:
            columns = backend.merge_columns(columns, ColumnSums(received))
        state = state.with_columns(block, columns)
        block = next_block
    return state


def ring_backward(
    backend: BlockBackend,
    state: ForwardState,
    weights: GradientWeights,
    query_sum: Tensor | None,
    want_passage: bool,
    shards: Shards,
    communication: Communication,
) -> Tensor | None:
    """Fill query_sum [M, width] and return the gradient sum [n, width] of this rank's passages, or None if not wanted.

    `weights` are those of the block that forward computed last.
    """
    block, symmetric = state.block, weights.column is not None
    factors = torch.stack([weights.column, state.columns.shift]) if weights.column is not None else None
    passage_sum: Tensor | None = None
    first = True
    for step in range(communication.size):
        outgoing: list[Tensor] = []
        incoming: list[Tensor] = []
        next_block, received, sums = state.own, factors, None
        if step < communication.size - 2:
            next_block = receive_buffer(block, (communication.rank + step + 2) % communication.size, shards)
            outgoing, incoming = block.tensors(), next_block.tensors()
        if step < communication.size - 1 and factors is not None:
            passages = shards.passages[(communication.rank + step + 2) % communication.size]
            received = factors.new_empty(*factors.shape[:-1], passages)
            outgoing, incoming = [*outgoing, factors], [*incoming, received]
        if passage_sum is not None:
            sums = passage_sum.new_empty(len(block.passage), backend.width)
            outgoing, incoming = [*outgoing, passage_sum], [*incoming, sums]
        wait = communication.start_exchange(outgoing, incoming, -1)
        block_sum = state.rows.table.new_empty(len(block.passage), backend.width) if want_passage else None
        if state.rows.table.shape[-1] and len(block.passage):
            column, shift = (factors[0], factors[1]) if factors is not None else (None, state.rows.shift)
            gradient_weights = GradientWeights(weights.row, column, weights.ds_scale)
            sums_of_block = GradientSums(query_sum, block_sum, overwrite_query=first)
            backend.accumulate_gradients(block, state.rows, shift, gradient_weights, sums_of_block)
            first = False
        elif block_sum is not None:
            block_sum.zero_()
        wait()
        passage_sum = block_sum if block_sum is None or sums is None else block_sum.add_(sums)
        block, factors = next_block, received if symmetric else None
    return passage_sum


def receive_buffer(block: PassageBlock, rank: int, shards: Shards) -> PassageBlock:
    """An empty block for the passages of `rank`."""
    rows = shards.passages[rank]
    return block.map(lambda tensor: tensor.new_empty(rows, *tensor.shape[1:]), shards.first(rank))
