"""Interpolating the weights of models with the same architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from index.files import InputError
from retriever.models.fingerprint import without_provenance
from retriever.models.loading.text_settings import SIDES
from retriever.models.towers import Towers

Method = Literal["linear", "slerp"]
Weights = Mapping[str, Tensor]
"""Name in `state_dict` -> tensor."""

# Sine of the angle between two tensors below which they count as parallel, and slerp is linear.
_PARALLEL = 1e-6


def interpolate(first: Weights, second: Weights, share: float, method: Method) -> dict[str, Tensor]:
    """Interpolate between the weights of two models.

    linear: (1 − t) · a + t · b. slerp (Shoemake, SIGGRAPH 1985), for each tensor, with the angle θ between a and b as
    vectors: (sin((1 − t) θ) · a + sin(t θ) · b) / sin θ, and linear if they are parallel.

    Args:
        first: weights a.
        second: weights b, with the same names and shapes. Integer tensors must be equal.
        share: t, the share of b, from 0 to 1. With 0 and 1 the result is bitwise a and b.
        method: "linear" or "slerp".

    Returns:
        New tensors in the dtype of a; tensors of integers are those of a.
    """
    if share in (0.0, 1.0):
        return dict(second if share else first)
    return {name: _interpolated(a, second[name], share, method) for name, a in first.items()}


def _interpolated(a: Tensor, b: Tensor, share: float, method: Method) -> Tensor:
    if not a.is_floating_point():
        return a
    one, other = 1.0 - share, share
    if method == "slerp":
        # In float64: the sine of a small angle has few exact digits in float32.
        x, y = a.double().flatten(), b.double().flatten()
        norms = float(x.norm() * y.norm())
        cosine = float(x @ y) / norms if norms else 1.0
        angle = torch.tensor(max(-1.0, min(1.0, cosine)), dtype=torch.float64).acos()
        sine = float(angle.sin())
        if sine > _PARALLEL:
            one, other = float((one * angle).sin()) / sine, float((other * angle).sin()) / sine
    return torch.add(a * one, b, alpha=other)


def check_same_architecture(first: Towers, second: Towers, names: tuple[str, str]) -> None:
    """Check that two models have the same modules, configuration, vocabulary and shapes of weights.

    Args:
        first: a model.
        second: another model.
        names: their names in the message.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    for what, expected, found in _compared(first, second):
        if expected != found:
            raise InputError(
                f"{names[1]}: cannot be merged with {names[0]}: {what}: expected {_shown(expected)}, "
                f"found {_shown(found)}"
            )


def _compared(first: Towers, second: Towers) -> list[tuple[str, Any, Any]]:
    rows: list[tuple[str, Any, Any]] = [("kind of model", type(first).__name__, type(second).__name__)]
    if type(first) is not type(second):
        return rows
    rows += [("number of encoders", len(first.encoders), len(second.encoders))]
    for one, other in zip(first.encoders, second.encoders, strict=False):
        expected, found = (_settings(encoder) for encoder in (one, other))
        rows += [(name, expected.get(name), found.get(name)) for name in {**expected, **found}]
    expected, found = ({n: tuple(t.shape) for n, t in towers.model.state_dict().items()} for towers in (first, second))
    rows += [(f"shape of {name}", expected.get(name), found.get(name)) for name in {**expected, **found}]
    rows += [("modules", _modules(first), _modules(second))]
    for side in SIDES:
        # The settings contain the vocabulary, which is too long for a message.
        of_first, of_second = (
            f"sha256 {hashlib.sha256(towers.tokenizer(side).settings().encode()).hexdigest()[:12]}…"
            for towers in (first, second)
        )
        rows += [(f"tokenizer of a {side}", of_first, of_second)]
    return rows


def _settings(encoder: Any) -> dict[str, Any]:
    """The configuration of an encoder without what only training uses."""
    settings = without_provenance(encoder.config.to_dict())
    return {name: value for name, value in settings.items() if not name.endswith(("dropout", "dropout_prob"))}


def _modules(towers: Towers) -> list[str]:
    """The modules after each encoder, with their settings."""
    return [
        repr(module) for module in towers.model.modules() if type(module).__name__ in ("Pooling", "Dense", "Normalize")
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value!r:.60}"
