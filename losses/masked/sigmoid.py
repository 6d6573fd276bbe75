"""Positives of the sigmoid loss as a list, beside tiles in which `limit` and `guide` mask negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.distributed.api import DistributedBatch
from losses.distributed.sigmoid import SeparatedPositives, sigmoid_loss_over_ranks
from losses.inputs import ContrastiveBatch
from losses.masked.loss import of_one_process, positive_scores
from losses.masked.pairs import PositivePairs
from losses.precision import Precision, matmul_precision
from losses.torch_tiles.masks import PairGradients
from losses.torch_tiles.sigmoid import tiled_sigmoid_loss


def masked_sigmoid_loss(
    batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision, workspace_bytes: int
) -> Tensor:
    """`tiled_sigmoid_loss` of a batch with `options`."""
    alone = of_one_process(batch, precision, workspace_bytes, False)
    separated = _separate_positives(alone, logit_bias)
    of_block = separated.of_block(separated.guide, 0)
    return tiled_sigmoid_loss(batch, logit_bias, precision, workspace_bytes, (of_block, separated.scores))


def masked_sigmoid_loss_over_ranks(sharded: DistributedBatch, logit_bias: Tensor) -> Tensor:
    """`sigmoid_loss_over_ranks` of a batch with `options`. A positive on another rank takes a round of the passages."""
    return sigmoid_loss_over_ranks(sharded, logit_bias, _separate_positives(sharded, logit_bias))


@torch.no_grad()
def _separate_positives(sharded: DistributedBatch, logit_bias: Tensor) -> SeparatedPositives:
    batch = sharded.batch
    with matmul_precision(sharded.precision, batch.query.device):
        pairs = PositivePairs.of(batch, sharded.shards.pool_size)
        scores, masks, guide = positive_scores(sharded, pairs)
        scores = scores + logit_bias.double()
        values = -torch.sigmoid(-scores).to(logit_bias.dtype)
    return SeparatedPositives(scores, masks, PairGradients(pairs.rows, pairs.columns, values), guide)
