"""Positives of the sigmoid loss as a list, beside tiles in which `limit` and `guide` mask negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.inputs import ContrastiveBatch
from losses.masked.loss import positive_scores
from losses.masked.pairs import PositivePairs
from losses.precision import Precision, matmul_precision
from losses.torch_tiles.masks import PairGradients
from losses.torch_tiles.sigmoid import tiled_sigmoid_loss
from losses.torch_tiles.tiles import TileMasks


def masked_sigmoid_loss(
    batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision, workspace_bytes: int
) -> Tensor:
    """`tiled_sigmoid_loss` of a batch with `options`."""
    separated = _separate_positives(batch, logit_bias, precision, workspace_bytes)
    return tiled_sigmoid_loss(batch, logit_bias, precision, workspace_bytes, separated)


@torch.no_grad()
def _separate_positives(
    batch: ContrastiveBatch, logit_bias: Tensor, precision: Precision, workspace_bytes: int
) -> tuple[TileMasks, Tensor]:
    """Masks of the tiles with the derivatives at the positives, and the scores [M] float64 of the positives."""
    with matmul_precision(precision, batch.query.device):
        pairs = PositivePairs.of(batch, len(batch.passage))
        scores, masks, guide = positive_scores(batch, pairs, precision, workspace_bytes)
        scores = scores + logit_bias.double()
        values = -torch.sigmoid(-scores).to(logit_bias.dtype)
    return TileMasks(masks, guide, 0, PairGradients(pairs.rows, pairs.columns, values)), scores
