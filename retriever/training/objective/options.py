"""The options of the loss for one step, from the configuration and the prepared batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses import Guide, NegativeLimit, Negatives, Positives, Ragged, Teacher, TeacherScores
from retriever.config.loss import LossConfig
from retriever.config.loss_options import LimitConfig
from retriever.data.false_negatives import Integers
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
        cls,
        batch: PreparedBatch,
        passage: Tensor,
        config: LossConfig,
        *,
        guide: Guide | None = None,
        statistics: bool = False,
    ) -> tuple[Tensor, LossOptions]:
        """The pool and the options of a batch.

        Args:
            batch: The batch, or the share of this rank with the false negatives of the pool.
            passage: [rows, D], the pool and then the hard negatives that only their own query sees.
            config: The configuration of the loss.
            guide: Embeddings of the guide, if there is one.
            statistics: Whether the loss returns statistics too.

        Returns:
            The pool [N, D] and the options.
        """
        device, own = passage.device, None
        if batch.own_offsets is not None:
            pool = len(passage) - int(batch.own_offsets[-1])
            own = Ragged(passage[pool:], _on_device(batch.own_offsets, device))
            passage = passage[:pool]
        positives = None
        if batch.positive_pairs is not None:
            positives = Positives(_on_device(batch.positive_pairs, device), config.positives_reduction)
        options = cls(
            **_masks(batch, config, device),
            positives=positives,
            negatives=_negatives(config, own, guide),
            teacher=_teacher(batch, config, device),
            statistics=statistics,
        )
        return passage, options

    def arguments(self) -> dict[str, Any]:
        """The options that are given, by argument name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def _masks(batch: PreparedBatch, config: LossConfig, device: torch.device) -> dict[str, Any]:
    masks = batch.false_negatives
    if masks is None or not config.masks_false_negatives or not masks.any:
        return {}
    arrays = {"query_ids": masks.query_ids, "passage_ids": masks.passage_ids, "excluded": masks.excluded}
    return {name: _on_device(array, device) for name, array in arrays.items()}


def _teacher(batch: PreparedBatch, config: LossConfig, device: torch.device) -> TeacherScores | None:
    teacher, lists = config.teacher, batch.teacher
    # A source without scores has none in its batches.
    if not teacher.uses_scores or lists is None:
        return None
    passages, offsets = _on_device(lists.passages, device), _on_device(lists.offsets, device)
    scores = to_device(torch.from_numpy(lists.scores), device)
    kind: Any = teacher.kind
    return TeacherScores(
        passages, offsets, scores, kind, 1.0 if teacher.scale is None else teacher.scale, teacher.weight
    )


def _negatives(config: LossConfig, own: Ragged | None, guide: Guide | None) -> Negatives | None:
    limit = _limit(config.limit)
    if limit is None and own is None and guide is None and not config.same_side and not config.hardness:
        return None
    return Negatives(limit=limit, guide=guide, own=own, same_side=config.same_side, hardness=config.hardness)


def _on_device(array: Integers, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(array), device)


def _limit(config: LimitConfig) -> NegativeLimit | None:
    return NegativeLimit(config.margin, config.share) if config.given else None
