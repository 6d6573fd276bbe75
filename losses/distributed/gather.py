"""InfoNCE over ranks by all_gather: every rank stores the whole pool of passages. For pools that fit in the workspace.

Each rank sends, by collectives that move as many bytes as a ring of W − 1 hops: in forward n (width·e + 8 ids) per hop
and an all_reduce of the column sums of the pool, 4a W n; in backward n · width · a per hop. The symbols are those of
distributed/ring.py. Memory in addition to inputs and gradients: the pool and the sum of its gradient, W · n · width ·
(e + a) bytes.
"""

from __future__ import annotations

from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.blocks import BlockBackend, ColumnSums, GradientWeights, PassageBlock
from losses.distributed.communication import Communication
from losses.distributed.forward_state import ForwardState
from losses.inputs import ContrastiveBatch
from losses.precision import GradientSums


def gathered_pool(own: PassageBlock, shards: Shards, communication: Communication) -> PassageBlock:
    """All passages of the pool as one block."""
    return own.map(lambda rows: communication.gather_rows(rows, shards.passages), 0)


def gather_forward(
    backend: BlockBackend, pool: PassageBlock, batch: ContrastiveBatch, shards: Shards, communication: Communication
) -> ForwardState:
    """Compute the whole pool as one block. The column sums of all passages are complete on every rank."""
    state = ForwardState.initial(backend, shards.first_passage, pool)
    columns = state.add_block(backend, pool, batch)
    if batch.symmetric:
        before = columns.shift.clone()
        communication.reduce_max(columns.shift)
        backend.rescale_columns(columns, before)
        communication.reduce_sum(columns.table[1:])
    return state.with_columns(pool, columns)


def gather_backward(
    backend: BlockBackend,
    state: ForwardState,
    weights: GradientWeights,
    query_sum: Tensor | None,
    want_passage: bool,
    shards: Shards,
    communication: Communication,
) -> Tensor | None:
    """As `ring_backward`; `weights` are those of the whole pool."""
    pool = state.block
    pool_sum = state.rows.table.new_empty(len(pool.passage), backend.width) if want_passage else None
    if state.rows.table.shape[-1]:
        sums = GradientSums(query_sum, pool_sum, overwrite_query=True)
        backend.accumulate_gradients(pool, state.rows, state.columns.shift, weights, sums)
    elif pool_sum is not None:
        pool_sum.zero_()
    return None if pool_sum is None else communication.scatter_sums(pool_sum, shards.passages)


def own_columns(columns: ColumnSums, shards: Shards) -> ColumnSums:
    """The column sums of this rank's passages."""
    return ColumnSums(columns.table[..., shards.first_passage :][..., : shards.passages[shards.rank]])
