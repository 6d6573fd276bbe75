"""Half-precision weights exist only inside the context; gradients are summed in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retriever.config.model import ModelConfig
from retriever.models.mixed_precision import fp32_outputs, half_precision_weights
from retriever.models.modality import build_towers


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.to(self.linear.weight.dtype))


def test_weights_are_restored_bitwise_and_gradients_are_fp32_sums() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    pieces = torch.randn(300, 4, 8)
    with half_precision_weights([encoder], torch.bfloat16):
        assert encoder.linear.weight.dtype == torch.bfloat16
        for piece in pieces:
            encoder(piece).float().sum().backward()
        assert encoder.linear.weight.grad is None
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad.dtype == torch.float32
    # The gradient of each piece is rounded to bf16, their sum is not. A sum in bf16 would be off by a hundredth.
    exact = pieces.bfloat16().double().sum((0, 1))
    error = (encoder.linear.weight.grad[0].double() - exact).norm() / exact.norm()
    assert float(error) < 2e-3


def test_existing_gradients_are_added_to_and_weights_are_restored_after_an_error() -> None:
    encoder = Encoder()
    encoder.linear.bias.grad = torch.full((8,), 0.5)
    with pytest.raises(RuntimeError, match="stop"), half_precision_weights([encoder], torch.bfloat16):
        encoder(torch.ones(2, 8)).sum().backward()
        raise RuntimeError("stop")
    assert encoder.linear.weight.dtype == torch.float32
    torch.testing.assert_close(encoder.linear.bias.grad, torch.full((8,), 2.5))


def test_modules_after_the_encoder_compute_in_fp32(tiny: ModelConfig) -> None:
    towers = build_towers(tiny)
    ((_, embed),) = towers.memory_probes(64, 16)
    with half_precision_weights(towers.encoders, torch.bfloat16), fp32_outputs(towers.transformers):
        embeddings = embed()
    # Normalized in bf16 they would be off by a thousandth.
    torch.testing.assert_close(embeddings.double().norm(dim=1), torch.ones(len(embeddings)).double(), rtol=0, atol=1e-6)
