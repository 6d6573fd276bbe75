"""Patch dropout: a random part of a picture's patches passes through the tower in training (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retriever.errors import ConfigError


class PatchDropout:
    """A hook behind the embeddings of a vision encoder, where every patch has its position already.

    The class token and registers, which stand before the patches, are kept. Each picture loses patches of its own,
    all the same number. In evaluation nothing is left out.
    """

    def __init__(self, rate: float):
        self.rate = rate

    def attach(self, encoder: nn.Module) -> None:
        """Put the hook into a vision encoder of transformers, or into the vision half of a whole checkpoint.

        Raises:
            ConfigError: the encoder has no embeddings known here.
        """
        vision: Any = getattr(encoder, "vision_model", encoder)
        embeddings = getattr(vision, "embeddings", None)
        if not isinstance(embeddings, nn.Module):
            raise ConfigError(f"model.image.patch_dropout: not known for {type(encoder).__name__}; expected 0")
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
        # Sorted, so that the towers meet the patches in reading order, whatever was left out.
        order = torch.rand(len(output), patches, device=output.device).argsort(dim=1)[:, :kept].sort(dim=1).values
        rows = torch.arange(len(output), device=output.device)[:, None]
        return torch.cat([output[:, :before], output[:, before:][rows, order]], dim=1)
