"""Inputs of the loss benchmarks, and the error of a method against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scripts.benchmarks.losses.loss_clock import Problem, attempted
from scripts.benchmarks.losses.loss_methods import Found, Method, Pairs, Tolerance, oracle

LEAVES = ("dq", "dk", "dscale", "dbias")
FIGURES = ("loss", *LEAVES)
COSINE = 0.2


def unit_pairs(count: int, dim: int, dtype: torch.dtype, logit_scale: float, logit_bias: float, device: str) -> Pairs:
    """Random unit vectors. The cosine of a pair is about COSINE, so that the positive is neither hopeless nor trivial.

    The values are equal for all methods: bf16 ones are the float32 ones, rounded.
    """
    generator = torch.Generator(device).manual_seed(count + dim)

    def unit() -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dim, device=device, generator=generator), dim=1)

    query = unit()
    passage = unit().mul_((1 - COSINE**2) ** 0.5).add_(query, alpha=COSINE)
    passage = torch.nn.functional.normalize(passage, dim=1).to(dtype)
    scalars = (torch.tensor(float(value), device=device) for value in (logit_scale, logit_bias))
    return Pairs(*(leaf.requires_grad_() for leaf in (query.to(dtype), passage, *scalars)))


@dataclass
class Check:
    """Relative errors of a method against float64, or why there are none."""

    errors: dict[str, float]
    problem: Problem | None = None
    fault: str | None = None


def compared(method: Method, pairs: Pairs) -> Check:
    """Run the method once and compare it with the reference. Errors beyond tolerance of our losses are faults."""
    found = attempted(lambda: method.run(pairs), pairs.query.is_cuda)
    if isinstance(found, Problem):
        return Check({}, found, found.text if method.tolerance and found.ours_to_mend else None)
    errors = relative_errors(found, oracle(pairs, method.kind, method.symmetric, method.masks))
    return Check(errors, fault=fault(errors, method.tolerance) if method.tolerance else None)


def relative_errors(found: Found, truth: Found) -> dict[str, float]:
    """|found − truth| / |truth| of the loss and of each gradient, in the Euclidean norm."""
    errors = {"loss": relative(found.loss, truth.loss)}
    for name, ours, wide in zip(LEAVES, found.gradients, truth.gradients, strict=True):
        if ours is not None and wide is not None:
            errors[name] = relative(ours, wide)
    return errors


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error of a tensor, computed in float64."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def fault(errors: dict[str, float], tolerance: Tolerance) -> str | None:
    """Describe the errors beyond tolerance, or return None. NaN is beyond any tolerance."""
    beyond = []
    for name, error in errors.items():
        limit = tolerance.loss if name == "loss" else tolerance.gradient
        if not error <= limit:
            beyond.append(f"relative error of {name} {error:.2e}, at most {limit:g} expected")
    return "; ".join(beyond) or None
