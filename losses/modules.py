"""`InfCLLoss` and `SigmoidLoss`: the losses as modules with a learnable, clamped logit_scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn

from losses import inf_cl, sigmoid
from losses.distributed.api import Exchange
from losses.inf_cl import inf_cl_loss
from losses.inputs import check_bool, check_choice, check_number, checked_workspace
from losses.precision import Precision
from losses.sigmoid import sigmoid_loss


class HeldGroup:
    """Holds a process group, or none, which torch can neither copy nor pickle."""

    def __init__(self, group: Any, missing: str = "") -> None:
        self._group = group
        self._missing = missing

    def get(self) -> Any:
        """The group, or None for the loss of one process.

        Raises:
            ValueError: it stayed behind when the module was pickled.
        """
        if self._missing:
            raise ValueError(self._missing)
        return self._group

    def __copy__(self) -> HeldGroup:
        return self

    def __deepcopy__(self, memo: Any) -> HeldGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is None or self._missing:
            return HeldGroup, (None, self._missing)
        return _restored, (distributed.get_world_size(self._group), self._group is distributed.group.WORLD)


def _restored(size: int, world: bool) -> HeldGroup:
    """The default group where it was that one and is there again with as many processes; otherwise what is missing."""
    if world and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() == size:
        return HeldGroup(distributed.group.WORLD)
    return HeldGroup(
        None,
        f"group must be set again: this loss was pickled with a process group of {size} processes; set its attribute "
        "`group`, to None for the loss of one process",
    )


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


class InfCLLoss(LearnedScale):
    """`inf_cl_loss` with a learnable, clamped logit_scale.

    The clamp is that of Radford et al., arXiv 2103.00020. Keep `log_logit_scale` out of weight decay, which would pull
    the scale towards 1.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 20.0,
        learnable: bool = True,
        max_logit_scale: float = 100.0,
        symmetric: bool = False,
        group: Any = None,
        precision: Precision = "auto",
        implementation: inf_cl.Implementation = "auto",
        exchange: Exchange = "auto",
        workspace_mib: float = 256,
    ) -> None:
        scale = (logit_scale, learnable, max_logit_scale)
        super().__init__(*scale, group, precision, implementation, workspace_mib, inf_cl.Implementation)
        check_choice("exchange", exchange, Exchange)
        check_bool("symmetric", symmetric)
        self.symmetric = symmetric
        self.exchange: Exchange = exchange

    def forward(
        self,
        query: Tensor,
        passage: Tensor,
        *,
        positive: Tensor | None = None,
        excluded: Tensor | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of `inf_cl_loss`, which see for shapes and errors."""
        return inf_cl_loss(
            query,
            passage,
            logit_scale=self.logit_scale,
            positive=positive,
            excluded=excluded,
            symmetric=self.symmetric,
            query_ids=query_ids,
            passage_ids=passage_ids,
            group=self.group,
            precision=self.precision,
            implementation=self.implementation,
            exchange=self.exchange,
            workspace_mib=self.workspace_mib,
        )

    def extra_repr(self) -> str:
        return f"symmetric={self.symmetric}, {super().extra_repr()}"


class SigmoidLoss(LearnedScale):
    """`sigmoid_loss` with a learnable, clamped logit_scale and a learnable logit_bias, begun as in
    SigLIP.

    Keep `log_logit_scale` and `logit_bias` out of weight decay.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        learnable: bool = True,
        max_logit_scale: float = 100.0,
        group: Any = None,
        precision: Precision = "auto",
        implementation: sigmoid.Implementation = "auto",
        workspace_mib: float = 256,
    ) -> None:
        scale = (logit_scale, learnable, max_logit_scale)
        super().__init__(*scale, group, precision, implementation, workspace_mib, sigmoid.Implementation)
        check_number("logit_bias", logit_bias)
        self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)), requires_grad=learnable)

    def forward(
        self,
        query: Tensor,
        passage: Tensor,
        *,
        positive: Tensor | None = None,
        excluded: Tensor | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of `sigmoid_loss`, which see for shapes and errors."""
        return sigmoid_loss(
            query,
            passage,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            positive=positive,
            excluded=excluded,
            query_ids=query_ids,
            passage_ids=passage_ids,
            group=self.group,
            precision=self.precision,
            implementation=self.implementation,
            workspace_mib=self.workspace_mib,
        )
