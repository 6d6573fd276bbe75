"""The sigmoid loss over ranks: one pass of the passages around a ring in forward, which also computes the gradients.

Rank r of W computes block r − k of the pool at step k, as in distributed/ring.py. The sum of a block's gradient
follows the block one step behind. It excludes the part of the block's own rank, which stays there; one more hop
returns the sum to that rank. Each rank sends the next_block, for shards of n passages of dimension D, e bytes per
embedding value, a bytes per sum (4; 8 in float64), and ids of 8 bytes if given:

    forward      (W − 1) n (D·e + 8 ids)      blocks, ids
               + (W − 1) n D·a                gradients; all but the last hop overlap with computation

and twice a few numbers: sizes, and the loss. Backward sends nothing. Memory in addition to inputs: two gradients until
backward and, during forward, two blocks and three sums of a block's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses.distributed.api import DistributedBatch
from losses.distributed.blocks import PassageBlock
from losses.distributed.ring import receive_buffer
from losses.distributed.torch_blocks import pairs_in_block
from losses.inputs import ContrastiveBatch
from losses.torch_tiles.masks import NegativeMasks, PairGradients
from losses.torch_tiles.sigmoid import saved_gradient_dtype, scale_by_upstream, tiled_sigmoid_values
from losses.torch_tiles.tiles import TileMasks
from losses.triton.sigmoid import sigmoid_values


@dataclass(frozen=True)
class SeparatedPositives:
    """Positives as a list, beside tiles in which `limit` and `guide` mask negatives (losses/masked/sigmoid.py).

    Attributes:
        scores: [M] float64, those of the queries' positives.
        masks: Masks of the rows.
        gradients: Derivatives at the positives.
        guide: [N, G] the guide's embeddings of this rank's passages, or None.
    """

    scores: Tensor
    masks: NegativeMasks
    gradients: PairGradients
    guide: Tensor | None

    def of_block(self, guide: Tensor | None, first: int) -> TileMasks:
        """Masks of a block that begins at row `first` of the pool, with the guide's embeddings of its passages."""
        return TileMasks(self.masks, guide, first, self.gradients)


def sigmoid_loss_over_ranks(
    sharded: DistributedBatch, logit_bias: Tensor, separated: SeparatedPositives | None = None
) -> Tensor:
    """0-dim sigmoid loss over the rows of all ranks, the same bits on every rank; differentiable once.

    Gradients are W times this rank's contribution, so their mean over ranks is the gradient of the whole batch.
    """
    batch = sharded.batch
    return _SigmoidOverRanks.apply(batch.query, batch.passage, batch.logit_scale, logit_bias, sharded, separated)


class _SigmoidOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *leaves, sharded, separated = arguments
        shards, communication = sharded.shards, sharded.communication
        sums = _SigmoidSums(sharded, leaves[3], ctx.needs_input_grad[:4], separated)
        passage_sum = _ring_pass(sums, sharded)
        # The same order of summation on all ranks gives the same bits.
        shares = communication.gather_rows(sums.loss[None], [1] * communication.size)
        loss = (shares.sum() / shards.total_queries).to(sharded.batch.logit_scale.dtype)
        share = communication.size / shards.total_queries
        found = (sums.query_sum, passage_sum, sums.scale, sums.bias)
        ctx.dtypes = tuple(leaf.dtype for leaf in leaves)
        ctx.save_for_backward(
            *(
                (each * share).to(saved_gradient_dtype(dtype)) if wanted else None
                for each, dtype, wanted in zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)
            )
        )
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*scale_by_upstream(ctx.saved_tensors, upstream, ctx.dtypes), None, None)


class _SigmoidSums:
    """Sums of the loss and its gradients over the blocks that this rank's queries have been scored against."""

    def __init__(
        self,
        sharded: DistributedBatch,
        logit_bias: Tensor,
        wanted: tuple[bool, ...],
        separated: SeparatedPositives | None,
    ) -> None:
        batch = sharded.batch
        self.sharded, self.logit_bias, self.wanted, self.separated = sharded, logit_bias, wanted, separated
        self.dtype = batch.logit_scale.dtype
        self.query_sum = torch.zeros_like(batch.query, dtype=self.dtype)
        self.loss, self.scale, self.bias = batch.query.new_zeros(3, dtype=torch.float64)
        if separated is not None:
            self.loss += nn.functional.softplus(-separated.scores, threshold=500).sum()

    def add_block(self, block: PassageBlock) -> Tensor:
        """Add one block; returns this rank's part [n, D] of the gradient of the block's passages."""
        queries = len(self.query_sum)
        if not queries or not len(block.passage):
            return self.query_sum.new_zeros(block.passage.shape)
        loss, query, passage, scale, bias = self._values(block)
        # Each is a mean over the queries of this rank.
        self.loss += loss * queries
        if self.wanted[0]:
            self.query_sum.add_(query, alpha=queries)
        if self.wanted[2]:
            self.scale += scale * queries
        if self.wanted[3]:
            self.bias += bias * queries
        return passage.to(self.dtype).mul_(queries) if self.wanted[1] else self.query_sum.new_zeros(0)

    def _values(self, block: PassageBlock) -> Any:
        sharded, batch = self.sharded, self.sharded.batch
        block_positive = batch.positive - block.first
        if not sharded.fused:
            block_batch = ContrastiveBatch(
                batch.query,
                block.passage,
                batch.logit_scale,
                block_positive,
                batch.query_ids,
                block.ids,
                symmetric=True,
                excluded=pairs_in_block(batch, block.first),
            )
            how = (self.logit_bias, sharded.precision, sharded.workspace_bytes, self.wanted)
            if self.separated is None:
                return tiled_sigmoid_values(block_batch, *how)
            masks = self.separated.of_block(block.guide, block.first)
            # The losses of the positives have been added.
            return tiled_sigmoid_values(block_batch, *how, (masks, self.separated.scores[:0]))
        return sigmoid_values(
            batch.query,
            block.passage,
            batch.logit_scale,
            self.logit_bias,
            block_positive,
            batch.query_ids,
            block.ids,
            batch.excluded,
            batch.diagonal and block.first == sharded.shards.first_passage,
            sharded.precision,
            sharded.workspace_bytes,
            list(self.wanted),
            True,
            block.first,
        )


def _ring_pass(sums: _SigmoidSums, sharded: DistributedBatch) -> Tensor:
    """Add all blocks; returns the gradient sum [n, D] of this rank's passages."""
    batch, shards, communication = sharded.batch, sharded.shards, sharded.communication
    guide = None if sums.separated is None else sums.separated.guide
    block = PassageBlock(batch.passage.contiguous(), batch.passage_ids, shards.first_passage, guide)
    want_passage = sums.wanted[1]
    own_sum = outgoing_sum = sums.query_sum.new_zeros(0)
    for step in range(communication.size):
        outgoing: list[Tensor] = []
        incoming: list[Tensor] = []
        next_block, received = block, None
        if step < communication.size - 1:
            next_block = receive_buffer(block, (communication.rank - step - 1) % communication.size, shards)
            outgoing, incoming = block.tensors(), next_block.tensors()
        if step > 1 and want_passage:
            received = torch.empty_like(block.passage, dtype=sums.dtype)
            outgoing, incoming = [*outgoing, outgoing_sum], [*incoming, received]
        wait = communication.start_exchange(outgoing, incoming, 1)
        block_sum = sums.add_block(block)
        wait()
        if step == 0:
            own_sum = block_sum
        else:
            outgoing_sum = block_sum if received is None else block_sum.add_(received)
        block = next_block
    if communication.size > 1 and want_passage:
        from_others = torch.empty_like(own_sum)
        communication.start_exchange([outgoing_sum], [from_others], 1)()
        own_sum.add_(from_others)
    return own_sum
