"""The kernel of the sigmoid loss on a GPU: errors, no synchronization, determinism, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import sigmoid_loss
from losses.triton.launch import why_not_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or why_not_fused(torch.empty(0, device="cuda")) is not None,
        reason="needs a GPU that the kernels run on",
    ),
]


def leaves_of(queries: int, passages: int, dims: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    query, passage = (normalize(torch.randn(rows, dims, device="cuda"), dim=1) for rows in (queries, passages))
    passage[:queries] = normalize(passage[:queries] + query, dim=1)
    numbers = (torch.tensor(number, device="cuda") for number in (20.0, -9.0))
    return [each.requires_grad_() for each in (query.to(dtype), passage.to(dtype), *numbers)]


def value_and_gradients(leaves: list[Tensor], implementation: Any, **options: Any) -> list[Tensor]:
    query, passage, scale, bias = leaves
    loss = sigmoid_loss(
        query, passage, logit_scale=scale, logit_bias=bias, implementation=implementation, **options
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "precision", "loss_error", "gradient_error"),
    [
        (torch.bfloat16, "bf16", 1e-4, 4e-3),
        (torch.float16, "auto", 1e-4, 1e-3),
        (torch.float32, "tf32", 1e-4, 5e-4),
        (torch.float32, "fp32", 1e-6, 5e-6),
    ],
)
@pytest.mark.parametrize("dims", [64, 100, 384, 768, 1152])
def test_errors_against_float64(
    dtype: torch.dtype, precision: Any, loss_error: float, gradient_error: float, dims: int
) -> None:
    leaves = leaves_of(1000, 1531, dims, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    masks: dict[str, Any] = {
        "positive": torch.randperm(1531, device="cuda")[:1000],
        "passage_ids": torch.randint(700, (1531,), device="cuda"),
    }
    for options in ({}, masks):
        truth = value_and_gradients(exact, "full", **options)
        size = size_of_scale_terms(exact, **options)
        for mib in (0.25, 256):
            found = value_and_gradients(leaves, "triton", precision=precision, workspace_mib=mib, **options)
            errors = relative_errors(found, truth)
            # Relative to the size of the terms, which cancel: in 1152 dimensions to a fortieth of their size.
            errors[3] = float((found[3].double() - truth[3]).abs() / size)
            assert errors[0] <= loss_error, errors
            if max(errors[1:]) <= gradient_error:
                continue
            # float16 has few bits for such small gradients: then the whole matrix in float16 has the same error.
            plain = relative_errors(value_and_gradients(leaves, "full", precision=precision, **options), truth)
            for error, of_plain in zip(errors[1:], plain[1:], strict=True):
                assert error <= max(gradient_error, 1.5 * of_plain), (errors, plain)


def size_of_scale_terms(
    leaves: list[Tensor], positive: Tensor | None = None, passage_ids: Tensor | None = None
) -> float:
    """Σ |dS ∘ Q Kᵀ|, the sum of the absolute terms of the gradient of logit_scale."""
    query, passage, scale, bias = (leaf.detach() for leaf in leaves)
    products = query @ passage.T
    gradient = torch.sigmoid(scale * products + bias)
    place = torch.arange(len(query), device=query.device) if positive is None else positive
    own = torch.zeros_like(gradient).scatter_(1, place[:, None], 1).bool()
    gradient[own] -= 1
    if passage_ids is not None:
        gradient[(passage_ids[place][:, None] == passage_ids) & ~own] = 0
    return float((gradient * products).abs().sum() / len(query))


def test_same_bits_each_time_without_synchronizing() -> None:
    leaves = leaves_of(3001, 4099, 768, torch.bfloat16)
    first = value_and_gradients(leaves, "triton", workspace_mib=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = value_and_gradients(leaves, "triton", workspace_mib=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))


def test_captured_in_a_cuda_graph() -> None:
    leaves = leaves_of(1000, 1531, 768, torch.bfloat16)
    eager = value_and_gradients(leaves, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(leaves, "triton")
    graph.replay()
    assert all(map(torch.equal, captured, eager))


def test_compiled_into_one_graph() -> None:
    leaves = leaves_of(1000, 1531, 768, torch.bfloat16)
    eager = value_and_gradients(leaves, "triton")

    @torch.compile(fullgraph=True)
    def loss_of(query: Tensor, passage: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(query, passage, logit_scale=scale, logit_bias=bias, implementation="triton")

    loss = loss_of(*leaves)
    for ours, theirs in zip([loss.detach(), *torch.autograd.grad(loss, leaves)], eager, strict=True):
        torch.testing.assert_close(ours, theirs)
