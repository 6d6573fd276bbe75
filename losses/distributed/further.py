"""Merging further terms into row sums over ranks (losses/torch_tiles/row_terms.py).

Row sums are those of a rank's queries, so only a single partition function communicates: the log-sum-exps of all
columns, 4 bytes per passage, and the column shares and positives of all queries, 12 bytes per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losses.distributed.agreement import Shards
from losses.distributed.blocks import BlockBackend, PassageBlock
from losses.distributed.communication import Communication
from losses.distributed.forward_state import ForwardState
from losses.inputs import ContrastiveBatch
from losses.torch_tiles.row_terms import Shares, column_counts


@dataclass(frozen=True)
class RankMerge:
    """This rank's shard of a batch, and how passages are exchanged."""

    batch: ContrastiveBatch
    shards: Shards
    communication: Communication
    exchange: Literal["ring", "gather"]


def shares_over_ranks(backend: BlockBackend, state: ForwardState, merge: RankMerge, further: Tensor) -> Shares:
    """Shares of the denominators of this rank's rows."""
    column = None
    if merge.batch.single_partition:
        column = _column_log_sums(backend, state, merge)[merge.batch.positive]
    return Shares.of(backend.log_sums(state.rows), column, further)


def column_counts_over_ranks(block: PassageBlock, merge: RankMerge, shares: Shares) -> Tensor:
    """`column_counts` of the passages of a block, for the queries of all ranks."""
    assert shares.column is not None
    queries = merge.shards.queries
    share = merge.communication.gather_rows(shares.column, queries)
    positive = merge.communication.gather_rows(merge.batch.positive, queries)
    return column_counts(positive - block.first, share, len(block.passage))


def _column_log_sums(backend: BlockBackend, state: ForwardState, merge: RankMerge) -> Tensor:
    """[N], log Σ exp of the columns of the pool."""
    found = backend.log_sums(state.columns)
    if merge.exchange == "gather":
        return found
    # After the last step of the ring, rank r has the columns of block r + 1.
    counts = merge.shards.passages
    gathered = merge.communication.gather_rows(found, [*counts[1:], counts[0]])
    return torch.cat([gathered[len(gathered) - counts[0] :], gathered[: len(gathered) - counts[0]]])
