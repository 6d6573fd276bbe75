"""The loss is built with the settings of the configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losses import InfCLLoss, Matryoshka, Negatives, SigmoidLoss, Teacher
from retriever.config.loss import LossConfig
from retriever.distributed.ranks import Ranks
from retriever.training.objective.loss import DistributedClipLoss, build_loss

SETTINGS: dict[str, Any] = {
    "implementation": "chunked",
    "precision": "fp32",
    "workspace_mib": 7,
    "max_logit_scale": 30.0,
}


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [("inf_cl", {"symmetric": True, "exchange": "ring"}, InfCLLoss), ("sigmoid", {}, SigmoidLoss)],
)
def test_the_loss_has_the_configured_settings(name: Any, more: dict[str, Any], kind: type) -> None:
    loss = build_loss(LossConfig(name=name, logit_scale=12.0, **SETTINGS, **more), Ranks())
    assert isinstance(loss, kind)
    assert {setting: getattr(loss, setting) for setting in (*SETTINGS, *more)} == {**SETTINGS, **more}
    assert float(loss.logit_scale) == pytest.approx(12.0)


def test_the_clip_loss_over_ranks_refuses_options_by_name() -> None:
    sides = torch.eye(3), torch.eye(3)
    options = {"negatives": Negatives(same_side=True), "statistics": True, "teacher": Teacher(*sides, 1.0)}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"^{name}: expected none"):
            DistributedClipLoss()(*sides, **{name: value})
    with pytest.raises(ValueError, match=r"^matryoshka: expected none"):
        DistributedClipLoss(matryoshka=Matryoshka((2,)))(*sides)
