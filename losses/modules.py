"""`InfCLLoss` and `SigmoidLoss`: the losses as modules with a learnable, clamped logit_scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from losses import inf_cl, sigmoid
from losses.checks import check_bool, check_choice, check_number, checked_workspace
from losses.distributed.api import Exchange
from losses.inf_cl import inf_cl_loss
from losses.options import Matryoshka, Negatives, Positives, Teacher, TeacherScores
from losses.precision import Precision
from losses.sigmoid import sigmoid_loss


class GroupHandle:
    """Holds a process group or None. Copies share the group; pickling leaves it out."""

    def __init__(self, group: Any, missing: str = "") -> None:
        self._group = group
        self._missing = missing

    def get(self) -> Any:
        """The group, or None for the loss of one process.

        Raises:
            ValueError: If the group was lost when the module was pickled.
        """
        if self._missing:
            raise ValueError(self._missing)
        return self._group

    def __copy__(self) -> GroupHandle:
        return self

    def __deepcopy__(self, memo: Any) -> GroupHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is None or self._missing:
            return GroupHandle, (None, self._missing)
        return _restore_group, (distributed.get_world_size(self._group), self._group is distributed.group.WORLD)


def _restore_group(size: int, world: bool) -> GroupHandle:
    """Restore the default group if that was pickled and has the same size; otherwise a handle that raises when used."""
    if world and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() == size:
        return GroupHandle(distributed.group.WORLD)
    return GroupHandle(
        None,
        f"group must be set again: this loss was pickled with a process group of {size} processes; set its attribute "
        "`group`, to None for the loss of one process",
    )


class LossWithScale(nn.Module):
    """Base class of losses with the 0-dim parameter `log_logit_scale`.

    The parameter is the logarithm of the scale, so its steps are relative to the scale. The scale is clamped at
    `max_logit_scale`. Above the clamp, a gradient that would increase the scale is dropped and one that would decrease
    it passes, so that the parameter can leave the clamp again.
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
        self._group = GroupHandle(group)
        self.precision: Precision = precision
        self.implementation = implementation
        self.workspace_mib = workspace_mib

    @property
    def group(self) -> Any:
        """The process group, or None. Copies share it.

        After unpickling, a group other than the default must be set again.
        """
        return self._group.get()

    @group.setter
    def group(self, group: Any) -> None:
        self._group = GroupHandle(group)

    @property
    def logit_scale(self) -> Tensor:
        """0-dim tensor: exp(log_logit_scale), at most `max_logit_scale`."""
        # At least float32: a module cast to bf16 would have steps of 1/32 near log 100.
        dtype = torch.promote_types(self.log_logit_scale.dtype, torch.float32)
        clamp: Callable[[Tensor, float], Tensor] = _ClampFromAbove.apply
        return clamp(self.log_logit_scale.to(dtype), math.log(self.max_logit_scale)).exp()

    def extra_repr(self) -> str:
        return (
            f"learnable={self.log_logit_scale.requires_grad}, max_logit_scale={self.max_logit_scale}, "
            f"precision={self.precision}, implementation={self.implementation}"
        )


class _ClampFromAbove(torch.autograd.Function):
    """min(value, limit); the gradient is dropped only if a descent step would move further above the limit."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.limit = limit
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return torch.where((value >= ctx.limit) & (upstream < 0), 0, upstream), None


class InfCLLoss(LossWithScale):
    """`inf_cl_loss` as a module with a learnable, clamped logit_scale.

    See `inf_cl_loss` for the arguments it shares with this class. Exclude `log_logit_scale` from weight decay, which
    would pull the scale towards 1.

    Args:
        logit_scale: Initial scale, 1 / temperature, in (0, max_logit_scale]. Default: 20.
        learnable: Whether `log_logit_scale` requires a gradient. Default: True.
        max_logit_scale: Upper clamp of the scale. Default: 100, as in CLIP (Radford et al., arXiv 2103.00020).
        symmetric: Whether to add the column loss. Default: False.
        matryoshka: Prefix sizes whose losses are added up. Default: None.
        group: A `torch.distributed` process group, or None. Default: None.
        precision: "auto", "fp32", "tf32" or "bf16". Default: "auto".
        implementation: "auto", "full", "dense", "chunked" or "triton". Default: "auto".
        exchange: With a group, "auto", "ring" or "gather". Default: "auto".
        workspace_mib: Memory in MiB for tiles and temporaries. Default: 256.

    Attributes:
        log_logit_scale: 0-dim parameter, the logarithm of the scale.
        logit_scale: 0-dim tensor, the clamped scale.

    Raises:
        ValueError: If an argument is invalid. The message begins with the argument's name.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 20.0,
        learnable: bool = True,
        max_logit_scale: float = 100.0,
        symmetric: bool = False,
        matryoshka: Matryoshka | None = None,
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
        self.matryoshka = matryoshka
        self.exchange: Exchange = exchange

    def forward(
        self,
        query: Tensor,
        passage: Tensor,
        *,
        positive: Tensor | None = None,
        positives: Positives | None = None,
        excluded: Tensor | None = None,
        negatives: Negatives | None = None,
        statistics: bool = False,
        teacher: Teacher | TeacherScores | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> Any:
        """Compute the loss.

        Args:
            query: [M, D] query embeddings.
            passage: [N, D] passage embeddings of the same dtype and on the same device.
            positive: [M] integers, the row of each query's positive. Default: 0, …, M − 1.
            positives: Further positives of queries. Default: None.
            excluded: [R, 2] integers, pairs (query row, passage row) to leave out. Default: None.
            negatives: Which passages of the batch, and what else, are negatives. Default: None, every other passage.
            statistics: Whether to return statistics too. Default: False.
            teacher: Distillation from another model's embeddings or from given scores. Default: None.
            query_ids: [M] integers. Default: `passage_ids[positive]`.
            passage_ids: [N] integers; passages with a query's id are not its negatives. Default: None.

        Returns:
            0-dim loss or, with `statistics`, the loss and a `Statistics`, as `inf_cl_loss` returns them.

        Raises:
            ValueError: If an argument is invalid, as in `inf_cl_loss`.
        """
        return inf_cl_loss(
            query,
            passage,
            logit_scale=self.logit_scale,
            positive=positive,
            positives=positives,
            excluded=excluded,
            negatives=negatives,
            statistics=statistics,
            matryoshka=self.matryoshka,
            teacher=teacher,
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
        nested = f"matryoshka={self.matryoshka}, " if self.matryoshka is not None else ""
        return f"symmetric={self.symmetric}, {nested}{super().extra_repr()}"


class SigmoidLoss(LossWithScale):
    """`sigmoid_loss` as a module with a learnable, clamped logit_scale and a learnable logit_bias.

    The initial values are those of SigLIP (Zhai et al., arXiv 2303.15343). See `sigmoid_loss` for the arguments it
    shares with this class. Exclude `log_logit_scale` and `logit_bias` from weight decay.

    Args:
        logit_scale: Initial scale, 1 / temperature, in (0, max_logit_scale]. Default: 10.
        logit_bias: Initial bias of the scores. Default: −10.
        learnable: Whether `log_logit_scale` and `logit_bias` require a gradient. Default: True.
        max_logit_scale: Upper clamp of the scale. Default: 100, as in CLIP (Radford et al., arXiv 2103.00020).
        group: A `torch.distributed` process group, or None. Default: None.
        precision: "auto", "fp32", "tf32" or "bf16". Default: "auto".
        implementation: "auto", "full", "chunked" or "triton". Default: "auto".
        workspace_mib: Memory in MiB for tiles and temporaries. Default: 256.

    Attributes:
        log_logit_scale: 0-dim parameter, the logarithm of the scale.
        logit_bias: 0-dim parameter, the bias.
        logit_scale: 0-dim tensor, the clamped scale.

    Raises:
        ValueError: If an argument is invalid. The message begins with the argument's name.
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
        negatives: Negatives | None = None,
        query_ids: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            query: [M, D] query embeddings.
            passage: [N, D] passage embeddings of the same dtype and on the same device.
            positive: [M] integers, the row of each query's positive. Default: 0, …, M − 1.
            excluded: [R, 2] integers, pairs (query row, passage row) to leave out. Default: None.
            negatives: Removes negatives by `limit` or `guide`. Default: None.
            query_ids: [M] integers. Default: `passage_ids[positive]`.
            passage_ids: [N] integers; passages with a query's id are not its negatives. Default: None.

        Returns:
            0-dim loss, as `sigmoid_loss` returns it.

        Raises:
            ValueError: If an argument is invalid, as in `sigmoid_loss`.
        """
        return sigmoid_loss(
            query,
            passage,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            positive=positive,
            excluded=excluded,
            negatives=negatives,
            query_ids=query_ids,
            passage_ids=passage_ids,
            group=self.group,
            precision=self.precision,
            implementation=self.implementation,
            workspace_mib=self.workspace_mib,
        )
