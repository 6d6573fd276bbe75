"""What the loss modules share: a learnable logit_scale, positive and clamped, and settings that are checked early."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from losses.batch import check_choice, check_number, checked_workspace
from losses.held_group import HeldGroup
from losses.precision import Precision


class LearnedScale(nn.Module):
    """A loss with the parameter `log_logit_scale`, 0-dim: steps in it are relative steps of the scale.

    Above the clamp the loss sees `max_logit_scale`; a gradient that asks for a smaller scale passes, one that asks for
    a larger is dropped, so the parameter neither runs away nor gets stuck.
    """

    def __init__(
        self,
        logit_scale: float,
        learnable: bool,
        max_logit_scale: float,
        group: Any,
        precision: Precision,
        implementation: Any,
        workspace_mib: float,
        implementations: Any,
    ) -> None:
        super().__init__()
        check_number("max_logit_scale", max_logit_scale)
        check_number("logit_scale", logit_scale)
        if not max_logit_scale > 0:
            raise ValueError(f"max_logit_scale must be positive, found {max_logit_scale}")
        if not 0 < logit_scale <= max_logit_scale:
            raise ValueError(f"logit_scale must be in (0, {max_logit_scale}], found {logit_scale}")
        check_choice("precision", precision, Precision)
        check_choice("implementation", implementation, implementations)
        checked_workspace(workspace_mib)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)), requires_grad=learnable)
        self.max_logit_scale = max_logit_scale
        self._group = HeldGroup(group)
        self.precision: Precision = precision
        self.implementation = implementation
        self.workspace_mib = workspace_mib

    @property
    def group(self) -> Any:
        """The process group, or None; shared by copies, and to be set anew on a module that was pickled with one."""
        return self._group.get()

    @group.setter
    def group(self, group: Any) -> None:
        self._group = HeldGroup(group)

    @property
    def logit_scale(self) -> Tensor:
        """0-dim: exp(log_logit_scale), at most max_logit_scale."""
        # In float32 at least: a module cast to bf16 would take steps of 1/32 near log 100.
        dtype = torch.promote_types(self.log_logit_scale.dtype, torch.float32)
        return _ClampFromAbove.apply(self.log_logit_scale.to(dtype), math.log(self.max_logit_scale)).exp()

    def extra_repr(self) -> str:
        return (
            f"learnable={self.log_logit_scale.requires_grad}, max_logit_scale={self.max_logit_scale}, "
            f"precision={self.precision}, implementation={self.implementation}"
        )


class _ClampFromAbove(torch.autograd.Function):
    """min(value, limit), whose gradient is dropped only where a descent step would push further above the limit."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.limit = limit
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return torch.where((value >= ctx.limit) & (upstream < 0), 0, upstream), None
