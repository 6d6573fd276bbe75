"""Half-precision weights live only while they are used; gradients are summed in full precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from retriever.half_weights import half_weights


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.linear(inputs.to(self.linear.weight.dtype)))


def test_weights_return_bit_for_bit_and_gradients_are_fp32_sums() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    pieces = torch.randn(300, 4, 8)
    with half_weights([encoder], torch.bfloat16):
        assert encoder.linear.weight.dtype == torch.bfloat16
        for piece in pieces:
            out = encoder(piece).last_hidden_state
            assert out.dtype == torch.float32
            out.sum().backward()
        assert encoder.linear.weight.grad is None
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad.dtype == torch.float32
    # Each piece's own gradient is rounded to bf16, their sum is not: summed in bf16 it would be off by a hundredth.
    exact = pieces.bfloat16().double().sum((0, 1))
    error = (encoder.linear.weight.grad[0].double() - exact).norm() / exact.norm()
    assert float(error) < 2e-3


def test_gradients_from_before_are_added_to_and_an_error_leaves_the_weights_whole() -> None:
    encoder = Encoder()
    encoder.linear.bias.grad = torch.full((8,), 0.5)
    with pytest.raises(RuntimeError, match="stop"), half_weights([encoder], torch.bfloat16):
        encoder(torch.ones(2, 8)).last_hidden_state.sum().backward()
        raise RuntimeError("stop")
    assert encoder.linear.weight.dtype == torch.float32
    torch.testing.assert_close(encoder.linear.bias.grad, torch.full((8,), 2.5))
