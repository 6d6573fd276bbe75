"""Optimizers equal a float64 reference and resume exactly; the learning rate schedule; memory of their states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from losses import InfCLLoss
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.modality import build_towers
from retriever.training.optimization.optim import (
    Adafactor,
    OptimConfig,
    build_optimizer,
    lr_factor,
    parameter_groups,
    set_learning_rates,
)
from retriever.training.optimization.rates import learning_rates

SHAPES = [(40, 33), (64, 3, 4, 4), (31, 50), (7,), ()]


def gradients(steps: int, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    """Gradients of all shapes for each step, of very different magnitudes; one is zero."""
    generator = torch.Generator().manual_seed(0)
    values = [
        [
            torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (step - 2 + i)
            for i, shape in enumerate(SHAPES)
        ]
        for step in range(steps)
    ]
    values[1][0].zero_()
    return [[value.to(dtype) for value in step] for step in values]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: list[list[torch.Tensor]]) -> None:
    for values in steps:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value.clone()
        optimizer.step()


def reference_adafactor(
    parameter: torch.Tensor, steps: list[torch.Tensor], *, lr: float, betas: tuple[float, float], decay: float
) -> torch.Tensor:
    """The equations of the class with a full second moment, from which the factored one is computed."""
    p, momentum = parameter.clone(), torch.zeros_like(parameter)
    matrix = parameter.reshape(parameter.shape[0], -1) if parameter.ndim > 1 else parameter
    factored = parameter.ndim > 1 and min(matrix.shape) >= 32
    moment = torch.zeros_like(matrix)
    for t, gradient in enumerate(steps, start=1):
        beta2 = min(betas[1], 1 - t**-0.8)
        g = gradient.reshape(matrix.shape)
        # Row and column means are linear, so those of the full moment equal the stored ones.
        moment = beta2 * moment + (1 - beta2) * (g**2 + 1e-30)
        v = torch.outer(moment.mean(1), moment.mean(0)) / moment.mean() if factored else moment
        u = g / v.sqrt()
        u = u / max(1.0, float((u**2).mean().sqrt()))
        momentum = betas[0] * momentum + (1 - betas[0]) * u.reshape(p.shape)
        p = p * (1 - lr * decay) - lr * momentum
    return p


def test_adafactor_equals_its_equations() -> None:
    steps, parameters = gradients(6), start()
    optimizer = Adafactor(parameters, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, momentum_dtype=torch.float64)
    run(optimizer, parameters, steps)
    for i, (parameter, first) in enumerate(zip(parameters, start(), strict=True)):
        expected = reference_adafactor(first.detach(), [s[i] for s in steps], lr=0.02, betas=(0.9, 0.95), decay=0.1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_first_moment_differs_by_rounding_only(dtype: torch.dtype) -> None:
    exact, rounded = start(), start(dtype)
    arguments: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    run(Adafactor(exact, momentum_dtype=torch.float64, **arguments), exact, gradients(5))
    optimizer = Adafactor(rounded, **arguments)
    run(optimizer, rounded, gradients(5, dtype))
    for one, other, first in zip(exact, rounded, start(), strict=True):
        moved = (one - first).norm()
        # bf16 has 8 bits: relative error 2^-8 of the first moment, and of a bf16 parameter in each step.
        allowed = 2**-7 * moved + (5 * 2**-8 * first.norm() if dtype == torch.bfloat16 else 0)
        assert (other.double() - one).norm() <= allowed
        assert optimizer.state[other]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[rounded[0]]["exp_avg_sq_row"].dtype == torch.float32


def test_adafactor_minimizes_a_quadratic() -> None:
    torch.manual_seed(0)
    target = torch.randn(64, 64)
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = Adafactor([weight], lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.02


def test_parameters_without_gradient_are_unchanged() -> None:
    parameters = start()
    optimizer = Adafactor(parameters, lr=0.1, weight_decay=0.1)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(parameters[0], start()[0])
    for parameter, first in zip(parameters[1:], start()[1:], strict=True):
        assert torch.equal(parameter, first)
        assert parameter not in optimizer.state


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{i}", parameter) for i, parameter in enumerate(start(dtype))]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_from_a_loaded_state_is_bitwise_equal(name: Any, dtype: torch.dtype) -> None:
    config = OptimConfig(name=name, lr=0.01)
    steps = gradients(6, dtype)
    whole = named(dtype)
    run(build_optimizer(whole, config), [p for _, p in whole], steps)

    first = named(dtype)
    before = build_optimizer(first, config)
    run(before, [p for _, p in first], steps[:3])
    second = [(key, nn.Parameter(p.detach().clone())) for key, p in first]
    after = build_optimizer(second, config)
    after.load_state_dict(before.state_dict())
    for (_, one), (_, other) in zip(first, second, strict=True):
        for key, value in before.state[one].items():
            loaded = after.state[other][key]
            assert isinstance(value, torch.Tensor | int | float)
            if isinstance(value, torch.Tensor):
                assert loaded.dtype == value.dtype
    run(after, [p for _, p in second], steps[3:])
    for (_, one), (_, other) in zip(whole, second, strict=True):
        assert torch.equal(one, other)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def test_adafactor_state_takes_a_quarter_of_adamw_state() -> None:
    size = 512
    kept = {}
    for name in ("adamw", "adafactor"):
        weight = nn.Parameter(torch.zeros(size, size))
        optimizer = build_optimizer([("weight", weight)], OptimConfig(name=name))  # type: ignore[arg-type]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept[name] = state_bytes(optimizer) - (4 if name == "adamw" else 0)
    assert kept == {"adamw": 8 * size**2, "adafactor": 2 * size**2 + 4 * 2 * size}


def test_only_trainable_matrices_are_decayed_and_shared_ones_once() -> None:
    tower = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    scale = nn.Parameter(torch.tensor(3.0))
    parameters = [
        *((f"query.{name}", p) for name, p in tower.named_parameters()),
        *((f"passage.{name}", p) for name, p in tower.named_parameters()),
        ("loss.logit_scale", scale),
        ("frozen", frozen),
    ]
    decayed, others = parameter_groups(parameters, OptimConfig(weight_decay=0.1))
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in decayed["params"]] == [id(tower[0].weight)]
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in others["params"]] == [id(p) for p in (tower[0].bias, tower[1].weight, tower[1].bias, scale)]


def test_adamw_has_the_configured_settings() -> None:
    optimizer = build_optimizer(named(), OptimConfig(lr=0.5, betas=(0.8, 0.9), eps=0.1, weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.AdamW)
    found = [{k: g[k] for k in ("lr", "betas", "eps", "weight_decay", "fused")} for g in optimizer.param_groups]
    expected = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 0.1, "fused": True}
    assert found == [{**expected, "weight_decay": 0.3}, {**expected, "weight_decay": 0.0}]


def test_no_trainable_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        build_optimizer([("frozen", nn.Parameter(torch.ones(2), requires_grad=False))], OptimConfig())


def test_the_cosine_schedule_rises_to_one_and_falls_towards_zero() -> None:
    config = OptimConfig(warmup_fraction=0.1, schedule="cosine")
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[:11] == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_linear_and_constant_schedules() -> None:
    linear = OptimConfig(warmup_fraction=0.0, schedule="linear")
    assert [lr_factor(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = OptimConfig(warmup_fraction=0.5, schedule="constant")
    assert [lr_factor(step, 4, constant) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(0, 1, OptimConfig(warmup_fraction=1.0)) == 1.0


def test_warm_up_stable_decay() -> None:
    config = OptimConfig(warmup_fraction=0.2, schedule="wsd", decay_fraction=0.4)
    factors = [lr_factor(step, 10, config) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert lr_factor(9, 10, OptimConfig(warmup_fraction=0.0, schedule="wsd", decay_fraction=0.0)) == 1.0
    with pytest.raises(ValueError, match=r"^optim\.decay_fraction: expected at most 0.4"):
        OptimConfig(warmup_fraction=0.6, schedule="wsd", decay_fraction=0.5)


def test_each_part_of_a_model_has_its_learning_rate(tiny: ModelConfig) -> None:
    towers = build_towers(dataclasses.replace(tiny, shared=False, projection=8))
    loss = InfCLLoss()
    config = OptimConfig(lr=1.0, query_lr=2.0, passage_lr=3.0, projection_lr=4.0, logit_scale_lr=5.0, layer_decay=0.5)
    optimizer = build_optimizer(
        nn.ModuleDict({"towers": towers, "loss": loss}).named_parameters(), config, learning_rates(towers, loss, config)
    )
    set_learning_rates(optimizer, 0.1)
    found = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {*towers.parameters(), *loss.parameters()}
    for name, parameter in [*towers.named_parameters(), *loss.named_parameters()]:
        if "logit_scale" in name:
            expected = 5.0
        elif ".linear." in name:
            expected = 4.0
        else:
            expected = 2.0 if "sub_modules.query" in name else 3.0
            expected *= 0.25 if "embeddings" in name else 0.5 if "layer.0" in name else 1.0
        assert found[parameter] == pytest.approx(expected * 0.1), name
    shared = build_towers(tiny)
    with pytest.raises(ConfigError, match=r"optim\.query_lr: expected none for a shared tower"):
        learning_rates(shared, loss, OptimConfig(query_lr=1.0))
    with pytest.raises(ConfigError, match=r"optim\.logit_scale_lr: expected none without loss\.learn_logit_scale"):
        learning_rates(shared, InfCLLoss(learnable=False), OptimConfig(logit_scale_lr=1.0))


def test_frozen_sides_and_layers_get_no_gradient_and_have_no_dropout(tiny: ModelConfig) -> None:
    towers = build_towers(dataclasses.replace(tiny, shared=False, projection=8, freeze="query", freeze_layers=1))
    for name, parameter in towers.named_parameters():
        frozen = ("sub_modules.query.0" in name) or "embeddings" in name or "layer.0" in name
        assert parameter.requires_grad != frozen, name
    dropouts = {name: m.training for name, m in towers.named_modules() if isinstance(m, nn.Dropout)}
    assert any(dropouts.values())
    assert not any(on for name, on in dropouts.items() if "query" in name or "layer.0" in name)
    with pytest.raises(ConfigError, match=r"model\.freeze: expected none for a shared tower"):
        build_towers(dataclasses.replace(tiny, freeze="query"))
    with pytest.raises(ConfigError, match=r"model\.freeze_layers: expected at most 2, the layers, found 3"):
        build_towers(dataclasses.replace(tiny, freeze_layers=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ema", 1.0),
        ("layer_decay", 0.0),
        ("query_lr", -1.0),
        ("decay_fraction", 2.0),
        ("name", "sgd"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", 0.0),
        ("warmup_fraction", 1.5),
        ("schedule", "step"),
        ("max_grad_norm", 0.0),
    ],
)
def test_an_invalid_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^optim.{field}: expected "):
        OptimConfig(**{field: value})
