"""The one choice between towers of texts and towers of images and texts.

`Towers` embeds texts. `ImageTextTowers`, its subclass, embeds images too. Code that works with either kind loads or
builds the towers here, and asks `embeds_images` where images need something more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch

from retriever.config.model import ModelConfig
from retriever.models.images.folder import is_image_text_model
from retriever.models.towers import Towers, build_towers, load_towers

if TYPE_CHECKING:
    from retriever.models.images.towers import ImageTextTowers


def embeds_images(towers: Towers) -> TypeGuard[ImageTextTowers]:
    """Whether the towers embed images beside texts."""
    return towers.embeds_images


def load_any_towers(
    path_or_name: str, device: torch.device | str = "cpu", *, checked: Callable[[int], None] | None = None
) -> Towers:
    """Load towers of either kind for encoding: `load_image_text_towers` for a model of images and texts, otherwise
    `load_towers`, whose arguments and errors these are.
    """
    if is_image_text_model(path_or_name):
        from retriever.models.images.towers import load_image_text_towers

        return load_image_text_towers(path_or_name, device, checked=checked)
    return load_towers(path_or_name, device, checked=checked)


def build_any_towers(config: ModelConfig) -> Towers:
    """Build the towers of a training run: `build_image_text_towers` with `model.image`, otherwise `build_towers`."""
    if config.image.name:
        from retriever.models.images.towers import build_image_text_towers

        return build_image_text_towers(config)
    return build_towers(config)
