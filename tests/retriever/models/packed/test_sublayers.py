"""The fused end of a sublayer equals the modules: values, gradients and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from retriever.models.packed.sublayers import residual_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def drawn(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`hidden`, `bias`, `residual`, `weight` and `shift`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, rows, width), (width,), (1, rows, width), (width,), (width,)]
    # A mean far from zero shows whether it is subtracted in the variance.
    return [(torch.randn(shape, generator=generator) + 3).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def errors(fused: Any, plain: Any, inputs: list[Tensor]) -> list[float]:
    """Return the errors of the value and of each gradient, relative to float64."""
    exact = [each.detach().double().requires_grad_() for each in inputs]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    out, expected = fused(*inputs), plain(*exact)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    oracle = [expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())]
    return [float((f.detach().double() - e).norm() / e.norm()) for f, e in zip(found, oracle, strict=True)]


def plain_norm(hidden: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    return layer_norm(residual + hidden + bias, weight.shape, weight, shift, 1e-5)


BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (13, 48), (37, 129)])
def test_residual_norm_equals_the_modules(rows: int, width: int, dtype: torch.dtype) -> None:
    def fused(*inputs: Tensor) -> Tensor:
        return residual_norm(*inputs, eps=1e-5)

    assert max(errors(fused, plain_norm, drawn(rows, width, dtype))) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), [(5000, 768), (777, 1024), (100, 4096), (9, 8192)])
def test_residual_norm_of_many_or_wide_rows_on_a_gpu(rows: int, width: int, dtype: torch.dtype) -> None:
    def fused(*inputs: Tensor) -> Tensor:
        return residual_norm(*inputs, eps=1e-5)

    assert max(errors(fused, plain_norm, drawn(rows, width, dtype))) < BOUNDS[dtype]


def dropped(rows: int, width: int, dropout: float, seed: int) -> Tensor:
    """Return the entries [rows, width] that dropout drops, from the gradients of `hidden` and `residual`."""
    hidden, bias, residual, weight, shift = drawn(rows, width)
    torch.manual_seed(seed)
    out = residual_norm(hidden, bias, residual, weight, shift, eps=1e-5, dropout=dropout)
    of_hidden, of_residual = torch.autograd.grad(out.square().sum(), [hidden, residual])
    ratio = of_hidden / of_residual
    torch.testing.assert_close(ratio.unique().sort().values[[0, -1]].cpu(), torch.tensor([0.0, 1 / (1 - dropout)]))
    return (ratio == 0)[0]


def test_dropout_has_the_requested_rate() -> None:
    is_dropped = dropped(60, 64, 0.25, 0)
    assert torch.equal(is_dropped, dropped(60, 64, 0.25, 0)) and not torch.equal(is_dropped, dropped(60, 64, 0.25, 1))
    # 3,840 draws: three standard deviations are 0.021.
    assert abs(float(is_dropped.float().mean()) - 0.25) < 0.021
    assert float(is_dropped.float().mean(0).max()) < 0.5 and float(is_dropped.float().mean(1).max()) < 0.5


def test_values_and_gradients_use_the_same_dropout_mask() -> None:
    is_dropped, dropout = dropped(21, 48, 0.3, 5), 0.3

    def fused(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        return residual_norm(*inputs, eps=1e-5, dropout=dropout)

    def plain(hidden: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        kept = torch.where(is_dropped, 0.0, (hidden + bias) / (1 - dropout))
        return layer_norm(residual + kept, weight.shape, weight, shift, 1e-5)

    assert max(errors(fused, plain, drawn(21, 48))) < 2e-6


def test_without_a_graph_nothing_is_saved_and_the_value_is_the_same() -> None:
    inputs = drawn(9, 48)
    with torch.no_grad():
        bare = residual_norm(*inputs, eps=1e-5)
    assert torch.equal(bare, residual_norm(*inputs, eps=1e-5)) and bare.grad_fn is None


def test_residual_norm_of_no_rows_is_empty() -> None:
    inputs = drawn(0, 32)
    residual_norm(*inputs, eps=1e-5).sum().backward()
    assert all(float(each.grad.abs().sum()) == 0 for each in inputs if each.grad is not None)
    assert inputs[0].grad is not None and inputs[3].grad is not None
