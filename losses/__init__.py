"""Contrastive losses with memory linear in the batch size, and baseline losses from the literature."""

from __future__ import annotations

from losses.inf_cl import inf_cl_loss
from losses.literature import clip_loss, disco_clip_loss, gathered_clip_loss, local_rows_loss, ring_clip_loss
from losses.modules import InfCLLoss, SigmoidLoss
from losses.options import (
    Guide,
    Matryoshka,
    NegativeLimit,
    Negatives,
    Positives,
    Ragged,
    Statistics,
    Teacher,
    TeacherScores,
)
from losses.sigmoid import sigmoid_loss

__all__ = [
    "Guide",
    "InfCLLoss",
    "Matryoshka",
    "NegativeLimit",
    "Negatives",
    "Positives",
    "Ragged",
    "SigmoidLoss",
    "Statistics",
    "Teacher",
    "TeacherScores",
    "clip_loss",
    "disco_clip_loss",
    "gathered_clip_loss",
    "inf_cl_loss",
    "local_rows_loss",
    "ring_clip_loss",
    "sigmoid_loss",
]
