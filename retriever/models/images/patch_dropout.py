"""Patch dropout: in training, only a random part of an image's patches is used (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retriever.errors import ConfigError


class PatchDropout:
    """Forward hook that drops random patches after the patch embeddings of a vision encoder.

    Position embeddings have already been added there. The class token and register tokens, which come before the
    patches, are kept. Every image loses the same number of patches, drawn independently. In evaluation mode nothing is
    dropped.

    Args:
        rate: Fraction of the patches to drop.
    """

    def __init__(self, rate: float):
        self.rate = rate

    def attach(self, encoder: nn.Module) -> None:
        """Register the hook on a vision encoder of transformers, or on the vision encoder of a CLIP-like model.

        Raises:
            ConfigError: If the encoder is not a transformer with one sequence of patches.
        """
        vision: Any = getattr(encoder, "vision_model", encoder)
        embeddings = getattr(vision, "embeddings", None)
        # Convolutional networks and hierarchical transformers have a depth for each stage.
        if not isinstance(embeddings, nn.Module) or hasattr(vision.config, "depths"):
            raise ConfigError(f"model.image.patch_dropout: not supported for {type(encoder).__name__}; expected 0")
        size = vision.config.patch_size
        self._patch = int(size if isinstance(size, int) else size[0])
        embeddings.register_forward_hook(self._drop, with_kwargs=True)

    def _drop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        pixels = args[0] if args else kwargs["pixel_values"]
        patches = (pixels.shape[-2] // self._patch) * (pixels.shape[-1] // self._patch)
        before = output.shape[1] - patches
        kept = max(1, round(patches * (1 - self.rate)))
        # Sorted, so that the remaining patches keep their order.
        order = torch.rand(len(output), patches, device=output.device).argsort(dim=1)[:, :kept].sort(dim=1).values
        rows = torch.arange(len(output), device=output.device)[:, None]
        return torch.cat([output[:, :before], output[:, before:][rows, order]], dim=1)
