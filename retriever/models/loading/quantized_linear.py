"""Linear layers with weights of 4 bits (NF4, QLoRA, arXiv 2305.14314), by the library bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retriever.errors import ConfigError

PACKED, ABSMAX, SHAPE = "packed", "absmax", "shape"
_BLOCK = 64
"""Number of weights that share a scale. With its scale in fp32 a weight takes 4.5 bits."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weights are stored as NF4 and dequantized when they are used.

    Args:
        linear: The layer to replace; its weight is [out_features, in_features].
    """

    packed: Tensor
    absmax: Tensor
    shape: Tensor
    code: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from bitsandbytes.functional import get_4bit_type, quantize_4bit

        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, state = quantize_4bit(linear.weight.data.float(), blocksize=_BLOCK, quant_type="nf4")
        self.register_buffer(PACKED, packed)
        self.register_buffer(ABSMAX, state.absmax)
        self.register_buffer(SHAPE, torch.tensor(linear.weight.shape))
        # The 16 values of NF4. Made anew in each forward, they would be copied from the host each time.
        self.register_buffer("code", get_4bit_type("nf4", "cpu"), persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs [..., in_features] times the weights, [..., out_features], in the dtype of the inputs."""
        from bitsandbytes import matmul_4bit

        state = _state(self.absmax, self.code, (self.out_features, self.in_features), inputs.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        # bitsandbytes 0.48 multiplies by the transposed weights if it gets the codes as a column; 0.50 accepts both.
        return matmul_4bit(inputs, self.packed.t(), quant_state=state, bias=bias)


def quantize_base(encoders: Iterable[Any]) -> None:
    """Replace the frozen layers that LoRA adapts by layers with weights of 4 bits, in place.

    Raises:
        ConfigError: If bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError('model.lora.base: nf4 needs bitsandbytes: pip install "dense-retriever[qlora]"') from None
    from peft.tuners.lora import LoraLayer

    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, LoraLayer):
                linear: Any = module.get_base_layer()
                module.base_layer = QuantizedLinear(linear)


def dequantized(packed: Tensor, absmax: Tensor, shape: Tensor) -> Tensor:
    """Return the weights [out_features, in_features] in fp32 of the buffers of a `QuantizedLinear`."""
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type

    rows, columns = shape.tolist()
    return dequantize_4bit(packed, _state(absmax, get_4bit_type("nf4", absmax.device), (rows, columns), torch.float32))


def _state(absmax: Tensor, code: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState(absmax, torch.Size(shape), code, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
