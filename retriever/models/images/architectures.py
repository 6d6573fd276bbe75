"""Vision transformers from scratch, by the names that the field gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retriever.config.images import ARCHITECTURES
from retriever.errors import ConfigError
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig


def write_new_vision_encoder(name: str, side: int | None, folder: Path) -> None:
    """Randomly initialised weights of an architecture, with its image processor, as a Hugging Face folder.

    Statistics and crop are CLIP's.

    Args:
        side: of the square of pixels; None: the architecture's own.

    Raises:
        ConfigError: the side does not fit the patches.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel

    side = side or ARCHITECTURES[name][1]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_encoder(CLIPVisionModel(vision_config(name, side)), folder)
    with writing_weights(folder):
        processor.save_pretrained(folder)


def vision_config(name: str, side: int) -> CLIPVisionConfig:
    """What transformers must know to build an architecture for pictures of `side` x `side` pixels.

    The layers are CLIP's (a norm before the first of them, and one over the pooled class token) with the exact GELU,
    as OpenCLIP trains them.

    Raises:
        ConfigError: the side does not fit the patches.
    """
    from transformers import CLIPVisionConfig

    patch, _, width, layers, heads = ARCHITECTURES[name]
    if side % patch:
        raise ConfigError(f"model.image.size: expected a multiple of {name}'s patches of {patch} pixels, found {side}")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        hidden_act="gelu",
    )
