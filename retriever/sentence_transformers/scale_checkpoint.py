"""Learned scales of losses in the checkpoints of Transformers' Trainer.

The trainer of sentence-transformers optimizes the parameters of a loss, but saves those of the model only.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch.nn import Parameter
from transformers import TrainerCallback, trainer
from transformers.trainer_callback import ExportableState

from losses.modules import LossWithScale

logger = logging.getLogger(__name__)
# Each with its number among the scales that its trainer optimizes.
_known: weakref.WeakKeyDictionary[LossWithScale, int] = weakref.WeakKeyDictionary()


def remember(scale: LossWithScale) -> None:
    """Save and restore this module's `log_logit_scale` with the checkpoints of every trainer that optimizes it."""
    _known[scale] = 0


def number_of(scale: LossWithScale) -> int:
    """Its place among the scales that its trainer optimizes, the same on all ranks; 0 without a trainer."""
    return _known.get(scale, 0)


class LearnedScaleCallback(TrainerCallback, ExportableState):
    """Keeps the learned scales that a trainer optimizes in the `trainer_state.json` of its checkpoints.

    It needs no arguments, and finds the scales by the optimizer, in whose order they are saved. In a trainer that
    optimizes none it does nothing.
    """

    def __init__(self) -> None:
        self._parameters: list[Parameter] = []

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint: the values at this moment."""
        return {"args": {}, "attributes": {"log_logit_scales": [each.item() for each in self._parameters]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Restore the values of the checkpoint that training resumes from, if it does.

        Raises:
            ValueError: the checkpoint has another number of scales.
        """
        scales = _scales_in(optimizer)
        _known.update({scale: number for number, scale in enumerate(scales)})
        self._parameters = [scale.log_logit_scale for scale in scales]
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}).get("attributes", {}).get("log_logit_scales", [])
        # The trainer expects an entry of each callback, which a checkpoint written without this one lacks.
        state.stateful_callbacks[name] = self.state()
        if state.global_step == 0 or not self._parameters:
            return
        if not saved:
            logger.warning("The checkpoint has no learned scale of a loss: it begins anew.")
            return
        if len(saved) != len(self._parameters):
            raise ValueError(f"the checkpoint has {len(saved)} learned scales, the losses {len(self._parameters)}")
        with torch.no_grad():
            for parameter, value in zip(self._parameters, saved, strict=True):
                parameter.fill_(value)


def _scales_in(optimizer: Any) -> list[LossWithScale]:
    scales = {id(each.log_logit_scale): each for each in _known}
    groups = [] if optimizer is None else optimizer.param_groups
    return [scales[id(each)] for group in groups for each in group["params"] if id(each) in scales]


def install() -> None:
    """Give the callback to every trainer made from now on."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if LearnedScaleCallback not in callbacks:
        callbacks.append(LearnedScaleCallback)
