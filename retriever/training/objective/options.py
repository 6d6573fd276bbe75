"""The options of the loss for one step, from the configuration and the prepared batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses import NegativeLimit, Negatives, Positives, Teacher, TeacherScores
from retriever.config.loss import LossConfig
from retriever.config.loss_options import LimitConfig
from retriever.data.micro_batches import PreparedBatch
from retriever.utils.device import to_device


@dataclass(frozen=True)
class LossOptions:
    """Keyword arguments of the loss for one step. What is None or False is not passed."""

    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    excluded: Tensor | None = None
    positives: Positives | None = None
    negatives: Negatives | None = None
    teacher: Teacher | TeacherScores | None = None
    statistics: bool = False

    @classmethod
    def of(
        cls, batch: PreparedBatch, config: LossConfig, device: torch.device, *, statistics: bool = False
    ) -> LossOptions:
        """The options of a batch.

        Args:
            batch: The batch, or the share of this rank with the false negatives of the pool.
            config: The configuration of the loss.
            device: Device of the loss.
            statistics: Whether the loss returns statistics too.
        """
        return cls(**_masks(batch, config, device), negatives=_negatives(config), statistics=statistics)

    def arguments(self) -> dict[str, Any]:
        """The options that are given, by argument name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def _masks(batch: PreparedBatch, config: LossConfig, device: torch.device) -> dict[str, Any]:
    masks = batch.false_negatives
    if masks is None or not config.masks_false_negatives or not masks.any:
        return {}
    arrays = {"query_ids": masks.query_ids, "passage_ids": masks.passage_ids, "excluded": masks.excluded}
    return {name: to_device(torch.from_numpy(array), device) for name, array in arrays.items()}


def _negatives(config: LossConfig) -> Negatives | None:
    if not (config.limit.given or config.same_side or config.hardness):
        return None
    return Negatives(limit=_limit(config.limit), same_side=config.same_side, hardness=config.hardness)


def _limit(config: LimitConfig) -> NegativeLimit | None:
    return NegativeLimit(config.margin, config.share) if config.given else None
