"""The sigmoid loss over ranks by a ring: no pair needs to know of another, so one round of passages gives all there is.

Rank r of W meets block r − k of the pool at step k, as in distributed/ring.py, and one visit takes both loss and
gradients. The sum of a block's gradient follows it one step behind, without its own rank's part, which stays at home;
one more hop brings it there. Each rank sends, for shards of n passages, D wide, of e bytes a number, sums of a bytes
(4; 8 in float64), ids of 8 bytes where given:

    forward      (W − 1) n (D·e + 8 ids)      blocks, ids
               + (W − 1) n D·a                gradients, all but the last hop beside the tiles of a step

and two exchanges of a few numbers: sizes, and the loss. Backward sends nothing. Held beside inputs: two gradients until
backward, and during forward two blocks and three sums of a block's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.distributed.api import DistributedBatch
from losses.distributed.blocks import PassageBlock
from losses.distributed.ring import room_for
from losses.distributed.torch_blocks import pairs_in_block
from losses.inputs import ContrastiveBatch
from losses.torch_tiles.sigmoid import held_dtype, tiled_values, times_upstream
from losses.triton.sigmoid import sigmoid_values


def sigmoid_loss_over_ranks(ranked: DistributedBatch, logit_bias: Tensor) -> Tensor:
    """Scalar sigmoid loss of all ranks' rows, the same bits on every rank; differentiable once.

    Gradients are W times this rank's share, so that their mean over ranks is the gradient of the whole batch's loss.
    """
    batch = ranked.batch
    return _SigmoidOverRanks.apply(batch.query, batch.passage, batch.logit_scale, logit_bias, ranked)


class _SigmoidOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *leaves, ranked = arguments
        shards, communication = ranked.shards, ranked.communication
        visits = _Visits(ranked, leaves[3], ctx.needs_input_grad[:4])
        passage_sum = _round(visits, ranked)
        # One order of adding on all ranks: the same bits everywhere.
        shares = communication.gather_rows(visits.loss[None], [1] * communication.size)
        loss = (shares.sum() / shards.all_queries).to(ranked.batch.logit_scale.dtype)
        share = communication.size / shards.all_queries
        found = (visits.query_sum, passage_sum, visits.scale, visits.bias)
        ctx.dtypes = tuple(leaf.dtype for leaf in leaves)
        ctx.save_for_backward(
            *(
                (each * share).to(held_dtype(dtype)) if wanted else None
                for each, dtype, wanted in zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)
            )
        )
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*times_upstream(ctx.saved_tensors, upstream, ctx.dtypes), None)


class _Visits:
    """Sums over the blocks that this rank's queries have met: of losses, and of their gradients."""

    def __init__(self, ranked: DistributedBatch, logit_bias: Tensor, wanted: tuple[bool, ...]) -> None:
        batch = ranked.batch
        self.ranked, self.logit_bias, self.wanted = ranked, logit_bias, wanted
        self.dtype = batch.logit_scale.dtype
        self.query_sum = torch.zeros_like(batch.query, dtype=self.dtype)
        self.loss, self.scale, self.bias = batch.query.new_zeros(3, dtype=torch.float64)

    def meet(self, block: PassageBlock) -> Tensor:
        """Visit the tiles of one block; returns the sum [n, D] that its passages' gradient gains here."""
        queries = len(self.query_sum)
        if not queries or not len(block.passage):
            return self.query_sum.new_zeros(block.passage.shape)
        loss, query, passage, scale, bias = self._values(block)
        # Each is a mean over this rank's queries.
        self.loss += loss * queries
        if self.wanted[0]:
            self.query_sum.add_(query, alpha=queries)
        if self.wanted[2]:
            self.scale += scale * queries
        if self.wanted[3]:
            self.bias += bias * queries
        return passage.to(self.dtype).mul_(queries) if self.wanted[1] else self.query_sum.new_zeros(0)

    def _values(self, block: PassageBlock) -> Any:
        ranked, batch = self.ranked, self.ranked.batch
        place = batch.positive - block.first
        if not ranked.fused:
            here = ContrastiveBatch(
                batch.query,
                block.passage,
                batch.logit_scale,
                place,
                batch.query_ids,
                block.ids,
                symmetric=True,
                excluded=pairs_in_block(batch, block.first),
            )
            return tiled_values(here, self.logit_bias, ranked.precision, ranked.workspace_bytes, self.wanted)
        return sigmoid_values(
            batch.query,
            block.passage,
            batch.logit_scale,
            self.logit_bias,
            place,
            batch.query_ids,
            block.ids,
            batch.excluded,
            batch.diagonal and block.first == ranked.shards.first_passage,
            ranked.precision,
            ranked.workspace_bytes,
            list(self.wanted),
            True,
            block.first,
        )


def _round(visits: _Visits, ranked: DistributedBatch) -> Tensor:
    """Meet all blocks once; returns the sum [n, D] of the gradient of this rank's passages."""
    batch, shards, communication = ranked.batch, ranked.shards, ranked.communication
    block = PassageBlock(batch.passage.contiguous(), batch.passage_ids, shards.first_passage)
    want_passage = visits.wanted[1]
    at_home = travelling = visits.query_sum.new_zeros(0)
    for step in range(communication.size):
        outgoing: list[Tensor] = []
        incoming: list[Tensor] = []
        following, arriving = block, None
        if step < communication.size - 1:
            following = room_for(block, (communication.rank - step - 1) % communication.size, shards)
            outgoing, incoming = block.tensors(), following.tensors()
        if step > 1 and want_passage:
            arriving = torch.empty_like(block.passage, dtype=visits.dtype)
            outgoing, incoming = [*outgoing, travelling], [*incoming, arriving]
        wait = communication.start(outgoing, incoming, 1)
        here = visits.meet(block)
        wait()
        if step == 0:
            at_home = here
        else:
            travelling = here if arriving is None else here.add_(arriving)
        block = following
    if communication.size > 1 and want_passage:
        from_others = torch.empty_like(at_home)
        communication.start([travelling], [from_others], 1)()
        at_home.add_(from_others)
    return at_home
