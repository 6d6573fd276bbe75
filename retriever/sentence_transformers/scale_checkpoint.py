"""Save and restore the learned scales of losses with the checkpoints of the transformers Trainer.

`SentenceTransformerTrainer` optimizes the parameters of a loss but saves only those of the model.
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
# Registered scales, each with its index among the scales that its trainer optimizes.
_registered: weakref.WeakKeyDictionary[LossWithScale, int] = weakref.WeakKeyDictionary()


def register(scale: LossWithScale) -> None:
    """Include the `log_logit_scale` of this module in the checkpoints of every trainer that optimizes it."""
    _registered[scale] = 0


def index_of(scale: LossWithScale) -> int:
    """Return the index among the scales that its trainer optimizes, the same on all ranks; 0 without a trainer."""
    return _registered.get(scale, 0)


class LearnedScaleCallback(TrainerCallback, ExportableState):
    """Stores the learned scales that a trainer optimizes in the `trainer_state.json` of its checkpoints.

    The callback finds the scales through the optimizer and saves them in its order. It does nothing in a trainer that
    optimizes none.
    """

    def __init__(self) -> None:
        self._parameters: list[Parameter] = []

    def state(self) -> dict[str, Any]:
        """Return the current values, for a checkpoint."""
        return {"args": {}, "attributes": {"log_logit_scales": [parameter.item() for parameter in self._parameters]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Restore the values if training resumes from a checkpoint.

        Raises:
            ValueError: the checkpoint has a different number of scales.
        """
        scales = _scales_in(optimizer)
        _registered.update({scale: index for index, scale in enumerate(scales)})
        self._parameters = [scale.log_logit_scale for scale in scales]
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}).get("attributes", {}).get("log_logit_scales", [])
        # The trainer requires an entry for each callback; a checkpoint that was saved without this one has none.
        state.stateful_callbacks[name] = self.state()
        if state.global_step == 0 or not self._parameters:
            return
        if not saved:
            logger.warning("The checkpoint has no learned scale of the loss: the scale starts from its initial value.")
            return
        if len(saved) != len(self._parameters):
            raise ValueError(
                f"the checkpoint has {len(saved)} learned scales, but the losses have {len(self._parameters)}"
            )
        with torch.no_grad():
            for parameter, value in zip(self._parameters, saved, strict=True):
                parameter.fill_(value)


def _scales_in(optimizer: Any) -> list[LossWithScale]:
    scales = {id(scale.log_logit_scale): scale for scale in _registered}
    groups = [] if optimizer is None else optimizer.param_groups
    return [scales[id(parameter)] for group in groups for parameter in group["params"] if id(parameter) in scales]


def install() -> None:
    """Add the callback to every trainer that is created from now on."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if LearnedScaleCallback not in callbacks:
        callbacks.append(LearnedScaleCallback)
