"""Low-rank adaptation of the encoders (LoRA, Hu et al., arXiv 2106.09685), with the library peft.

peft replaces linear layers inside the encoders and leaves the model's class, its packed attention and its CUDA graphs
as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retriever.config.lora import LoraConfig
from retriever.errors import ConfigError
from retriever.models.loading.quantized_linear import ABSMAX, PACKED, SHAPE, dequantized

_ADAPTER = "default"
_DOWN, _UP, _BASE = f"lora_A.{_ADAPTER}.weight", f"lora_B.{_ADAPTER}.weight", "base_layer."


def add_lora(encoders: Iterable[Any], config: LoraConfig) -> None:
    """Freeze the weights of encoders and add trainable fp32 updates to their linear layers, in place.

    Raises:
        ConfigError: If peft is not installed, or the targets are not linear layers of the encoders.
    """
    try:
        import peft
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise ConfigError('model.lora.rank: needs peft: pip install "dense-retriever[lora]"') from None
    settings: Any = {
        "r": config.rank,
        "lora_alpha": config.scaling * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets) or "all-linear",
        "task_type": "FEATURE_EXTRACTION",
    }
    for encoder in encoders:
        try:
            encoder.add_adapter(peft.LoraConfig(**settings), _ADAPTER)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets: {' '.join(str(error).split())}") from None
        for name, module in encoder.named_modules():
            if isinstance(module, LoraLayer) and type(module.get_base_layer()) is not nn.Linear:
                kind = type(module.get_base_layer()).__name__
                raise ConfigError(f"model.lora.targets: expected linear layers, found {name}, a {kind}")


def cast_base(encoders: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the frozen weights of encoders with LoRA, in place. The updates and buffers keep their dtype."""
    for encoder in encoders:
        for name, parameter in encoder.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)


def merged_weights(weights: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Return the `state_dict` of the plain model, with W + scaling · B A for each adapted matrix W, in fp32.

    Args:
        weights: Full, unsharded tensors of a model with LoRA: W [out, in], A [rank, in] and B [out, rank]. A W that
            is stored in 4 bits is dequantized.
        scaling: Factor of the updates.
    """
    merged = {}
    for name, tensor in weights.items():
        if "lora_" in name:
            continue
        prefix, found, rest = name.rpartition(_BASE)
        if found and rest in (ABSMAX, SHAPE):
            continue
        value = tensor.float() if tensor.is_floating_point() else tensor
        if found and rest == PACKED:
            rest = "weight"
            value = dequantized(tensor, *(weights[f"{prefix}{_BASE}{part}"] for part in (ABSMAX, SHAPE)))
        if found and rest == "weight":
            down, up = weights[f"{prefix}{_DOWN}"].float(), weights[f"{prefix}{_UP}"].float()
            value = torch.addmm(value, up, down, alpha=scaling)
        merged[f"{prefix}{rest}"] = value
    return merged
