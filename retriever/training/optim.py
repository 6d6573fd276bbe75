"""Optimizers, their parameter groups, and the learning rate of every step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from retriever.config.run import OptimConfig


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """What `config.lr` is multiplied by in step 0 <= step < total.

    Rises linearly over the first round(warmup_fraction · total) steps, 1/w, 2/w, … 1; then falls from 1 by half a
    cosine or a line that would be zero at step `total`, or stays.
    """
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters that train: matrices with weight decay; biases, norms and the loss's scale without.

    A parameter that appears under several names, as the weights of a shared tower do, is taken once.
    """
    decayed: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else others)[parameter] = None
    groups = [
        {"params": list(some), "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (others, 0.0))
        # torch updates a group at once, and those that are divided among processes apart (models/fsdp.py); in the order
        # of all, so that a checkpoint does not depend on it.
        for _, some in itertools.groupby(parameters, key=lambda parameter: isinstance(parameter, DTensor))
    ]
    return groups


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """The optimizer for `named_parameters()`, with weight-decay groups; AdamW fused where torch has that.

    Raises:
        ValueError: no parameter trains.
    """
    groups = parameter_groups(named, config.weight_decay)
    if not groups:
        raise ValueError("named: expected at least one parameter that requires a gradient")
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, betas=config.betas, eps=1e-30 if config.eps is None else config.eps)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    eps = 1e-8 if config.eps is None else config.eps
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=eps, fused=devices <= {"cpu", "cuda"})


class Adafactor(Optimizer):
    """Adafactor as large vision and contrastive models are trained with it: close to Adam, at half its parameters'
    size and less in memory.

    With gradient g, t = 1, 2, …, and β₂ₜ = min(β₂, 1 − t^−0.8):

        V = β₂ₜ V + (1 − β₂ₜ)(g² + eps)      a matrix keeps only V's row and column means r, c: V ≈ r cᵀ / mean(r)
        u = g / √V,   u = u / max(1, RMS(u) / clip_threshold)
        m = β₁ m + (1 − β₁) u                in bf16, rounded after the parameter has been updated with it
        p = p (1 − lr · weight_decay) − lr · m

    From Shazeer and Stern (arXiv 1804.04235), without its relative steps and parameter scaling, as changed by Zhai et
    al. (Scaling Vision Transformers, arXiv 2106.04560, section 3.4) and used in arXiv 2410.17243. Unlike big_vision's,
    weight decay is multiplied by the learning rate, as AdamW's is: its weight_decay 1e-4 at lr 1e-3 is 0.1 here.

    Tensors of more dimensions are taken as matrices [first, rest]; those with a side under 32, and vectors, keep V
    whole. Moments are float32 (float64 for float64 parameters); every state is a tensor or a number.
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
        """Update every parameter that has a gradient; returns what `closure` returns."""
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
        update = _normalised(gradient, state, beta2, group["eps"])
        rms = update.norm() / math.sqrt(update.numel())
        clip = (group["clip_threshold"] / rms).clamp(max=1.0)
        # In place, for a pass over a large matrix costs more than its arithmetic: the update becomes the new momentum.
        momentum = update.mul_((1.0 - beta1) * clip).add_(state["exp_avg"], alpha=beta1)
        state["exp_avg"].copy_(momentum)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(momentum, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, with every state in the dtype it has there.

        torch would cast it to the parameter's: a bf16 parameter would round its float32 second moments.
        """
        super().load_state_dict(state_dict)
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value


def _as_matrix(tensor: Tensor) -> Tensor | None:
    """The tensor as [first, rest] where that is worth factoring."""
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


def _normalised(gradient: Tensor, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
    """g / √V, after V has taken in g."""
    matrix = _as_matrix(gradient)
    if matrix is None:
        state["exp_avg_sq"].lerp_(gradient.square().add_(eps), 1.0 - beta2)
        return gradient * state["exp_avg_sq"].rsqrt()
    square = matrix.square()
    row, column = state["exp_avg_sq_row"], state["exp_avg_sq_column"]
    row.lerp_(square.mean(dim=1).add_(eps), 1.0 - beta2)
    # A product, since torch's mean over the rows of a tall matrix takes two thirds of its size for partial sums.
    column.lerp_(torch.mv(square.T, square.new_full((len(square),), 1 / len(square))).add_(eps), 1.0 - beta2)
    update = torch.mul(matrix, (row / row.mean()).rsqrt_()[:, None], out=square)
    return update.mul_(column.rsqrt()).reshape(gradient.shape)
