"""Linear layers with weights of 4 bits: products, CUDA graphs, and the space that a run needs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retriever.config.lora import LoraConfig
from retriever.config.run import TrainConfig
from retriever.distributed.ranks import Ranks
from retriever.models.loading.quantized_linear import QuantizedLinear, dequantized
from retriever.training import run_dir
from retriever.training.cuda_graphs import can_use_cuda_graphs, why_no_cuda_graphs
from retriever.training.run_dir import RunFolder

pytest.importorskip("bitsandbytes")


def _product_of_0_48(inputs: Tensor, packed: Tensor, quant_state: Any, bias: Tensor | None) -> Tensor:
    """The product of bitsandbytes 0.48, which tells the side of a weight by the shape of its codes."""
    weight = dequantized(packed.reshape(-1, 1), quant_state.absmax, torch.tensor(quant_state.shape))
    return nn.functional.linear(inputs, weight if packed.shape[0] == 1 else weight.t(), bias)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 128)])
def test_products_are_those_of_the_dequantized_weights(
    shape: tuple[int, int], old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    layer = QuantizedLinear(linear)
    weight = dequantized(layer.packed, layer.absmax, layer.shape)
    assert weight.shape == shape and (weight - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    if old:
        monkeypatch.setattr("bitsandbytes.matmul_4bit", _product_of_0_48)
    else:
        # A forward copies nothing from the host.
        monkeypatch.setattr("bitsandbytes.functional.get_4bit_type", None)
    inputs = torch.randn(5, shape[1], requires_grad=True)
    found, expected = layer(inputs), nn.functional.linear(inputs, weight, linear.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for result in (found, expected):
        (gradient,) = torch.autograd.grad(result.square().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * found.detach() @ weight, rtol=1e-4, atol=1e-4)


def test_no_memory_is_left_for_cuda_graphs_that_are_not_used() -> None:
    encoder = nn.Sequential(nn.Linear(64, 64))
    encoder.config = SimpleNamespace(model_type="qwen3")
    towers: Any = SimpleNamespace(device=torch.device("cuda"), encoders=[encoder], padding_free=True)
    assert why_no_cuda_graphs(towers, "bf16") is None and can_use_cuda_graphs(TrainConfig(), towers, "bf16")
    for other in ("compile", "gradient_checkpointing", "shard_towers"):
        assert not can_use_cuda_graphs(TrainConfig(**{other: True}), towers, "bf16")
    encoder[0] = QuantizedLinear(encoder[0])
    assert "found 4 bits" in str(why_no_cuda_graphs(towers, "bf16"))


def test_space_is_needed_for_the_merged_model_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr(run_dir, "check_free_space", lambda folder, size, *rest, **named: needed.append(size))
    linear = nn.Linear(256, 256, bias=False).requires_grad_(False)
    modules = {"towers": nn.Sequential(QuantizedLinear(linear))}
    packed = sum(buffer.numel() * buffer.element_size() for buffer in modules["towers"].buffers())
    folder = RunFolder(tmp_path, Ranks())
    folder.check_space(modules, 2, LoraConfig(rank=4))
    assert needed == [3 * packed + 4 * 256 * 256]
    folder.check_space({"towers": linear.bfloat16()}, 2, LoraConfig(rank=4))
    assert needed[1] == 3 * 2 * 256 * 256 + 4 * 256 * 256
