"""Optimizers, parameter groups and the learning rate schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from retriever.config.optim import OptimConfig


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Return the factor of `config.lr` in a step.

    The factor rises linearly over the first w = round(warmup_fraction · total) steps: 1/w, 2/w, …, 1. Then it falls
    from 1 along half a cosine or a line that is zero at step `total`, or is constant. With the schedule "wsd" it is
    constant until the last d = round(decay_fraction · total) steps: 1, (d − 1)/d, …, 1/d.

    Args:
        step: the step, 0 ≤ step < total.
        total: number of steps of the run.
        config: warm-up and schedule.
    """
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = round(config.decay_fraction * total)
        return min(1.0, (total - step) / max(1, decay))
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters: matrices with weight decay; biases, norms and logit_scale without.

    A parameter with several names, such as a weight of a shared tower, is included once.

    Args:
        named: names and parameters.
        config: weight decay and learning rate.
        rates: peak learning rate of parameters that do not have that of the configuration. Default: None, all have.

    Returns:
        The groups, with the keys "params", "weight_decay", "lr" and "peak_lr".
    """
    decayed: dict[nn.Parameter, None] = {}
    not_decayed: dict[nn.Parameter, None] = {}
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else not_decayed)[parameter] = None
    rates = rates or {}

    def key(parameter: nn.Parameter) -> tuple[float, bool]:
        # A fused optimizer cannot update sharded and unsharded parameters in one group (models/fsdp.py).
        return rates.get(parameter, config.lr), isinstance(parameter, DTensor)

    return [
        {"params": list(group), "weight_decay": decay, "lr": rate, "peak_lr": rate}
        for parameters, decay in ((decayed, config.weight_decay), (not_decayed, 0.0))
        # The order of parameters is kept, so that checkpoints depend neither on sharding nor on learning rates.
        for (rate, _), group in itertools.groupby(parameters, key=key)
    ]


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """Build the optimizer for `named_parameters()`. AdamW is fused if torch supports it on the devices.

    Args:
        named: names and parameters.
        config: the optimizer.
        rates: peak learning rate of parameters that do not have that of the configuration. Default: None, all have.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    groups = parameter_groups(named, config, rates)
    if not groups:
        raise ValueError("named: expected at least one parameter that requires a gradient")
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, betas=config.betas, eps=1e-30 if config.eps is None else config.eps)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    eps = 1e-8 if config.eps is None else config.eps
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=eps, fused=devices <= {"cpu", "cuda"})


class Adafactor(Optimizer):
    """Adafactor with momentum, as used for large vision and contrastive models.

    Its updates are close to Adam's. Its state takes about half the memory of float32 parameters.

    With gradient g, t = 1, 2, …, and β₂ₜ = min(β₂, 1 − t^−0.8):

        V = β₂ₜ V + (1 − β₂ₜ)(g² + eps)      a matrix keeps only V's row and column means r, c: V ≈ r cᵀ / mean(r)
        u = g / √V,   u = u / max(1, RMS(u) / clip_threshold)
        m = β₁ m + (1 − β₁) u                rounded to bf16 after the parameter has been updated
        p = p (1 − lr · weight_decay) − lr · m

    From Shazeer and Stern (arXiv 1804.04235), without its relative steps and parameter scaling, as changed by Zhai et
    al. (Scaling Vision Transformers, arXiv 2106.04560, section 3.4) and used in arXiv 2410.17243. Unlike big_vision's,
    weight decay is multiplied by the learning rate, as AdamW's is: its weight_decay 1e-4 at lr 1e-3 is 0.1 here.

    Tensors with more than two dimensions are viewed as matrices [first, rest]. Vectors, and matrices with a side below
    32, store V in full. Second moments are float32 (float64 for float64 parameters).

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: β₁ and the limit of β₂ₜ. Default: (0.9, 0.95).
        eps: added to g². Default: 1e-30.
        weight_decay: decoupled weight decay, multiplied by the learning rate. Default: 0.
        clip_threshold: largest RMS of an update u. Default: 1.
        momentum_dtype: dtype in which m is stored. Default: bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        momentum_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_threshold": clip_threshold},
        )
        self._momentum_dtype = momentum_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
        if not state:
            state.update(_zero_state(gradient, self._momentum_dtype))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        beta2 = min(beta2, 1.0 - state["step"] ** -0.8)
        update = _normalized(gradient, state, beta2, group["eps"])
        rms = update.norm() / math.sqrt(update.numel())
        clip = (group["clip_threshold"] / rms).clamp(max=1.0)
        # In place, because memory traffic dominates: the tensor of the update becomes the new momentum.
        momentum = update.mul_((1.0 - beta1) * clip).add_(state["exp_avg"], alpha=beta1)
        state["exp_avg"].copy_(momentum)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(momentum, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict()`, with the saved dtypes.

        torch's own method casts states to the dtype of the parameter, which rounds float32 moments of bf16 parameters.
        """
        super().load_state_dict(state_dict)
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value


def _as_matrix(tensor: Tensor) -> Tensor | None:
    """Return a view [first, rest] of the tensor, or None if its second moment is not factored."""
    if tensor.ndim < 2:
        return None
    matrix = tensor.reshape(tensor.shape[0], -1)
    return matrix if min(matrix.shape) >= 32 else None


def _zero_state(gradient: Tensor, momentum_dtype: torch.dtype) -> dict[str, Any]:
    state = {"step": 0, "exp_avg": torch.zeros_like(gradient, dtype=momentum_dtype)}
    matrix = _as_matrix(gradient)
    if matrix is None:
        return {**state, "exp_avg_sq": torch.zeros_like(gradient)}
    rows, columns = matrix.shape
    return {**state, "exp_avg_sq_row": matrix.new_zeros(rows), "exp_avg_sq_column": matrix.new_zeros(columns)}


def _normalized(gradient: Tensor, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
    """Update V with the gradient g and return g / √V."""
    matrix = _as_matrix(gradient)
    if matrix is None:
        state["exp_avg_sq"].lerp_(gradient.square().add_(eps), 1.0 - beta2)
        return gradient * state["exp_avg_sq"].rsqrt()
    square = matrix.square()
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_column"]
    row.lerp_(square.mean(dim=1).add_(eps), 1.0 - beta2)
    # A product, because torch's mean over the rows of a tall matrix allocates two thirds of its size for partial sums.
    column.lerp_(torch.mv(square.T, square.new_full((len(square),), 1 / len(square))).add_(eps), 1.0 - beta2)
    update = torch.mul(matrix, (row / row.mean()).rsqrt_()[:, None], out=square)
    return update.mul_(column.rsqrt()).reshape(gradient.shape)
