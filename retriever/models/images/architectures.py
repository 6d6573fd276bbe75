"""Vision transformers from scratch, by their usual names such as ViT-B/32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retriever.config.images import ARCHITECTURES
from retriever.errors import ConfigError
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig


def write_new_vision_encoder(name: str, side: int | None, folder: Path) -> None:
    """Write a randomly initialized vision encoder and its image processor as a Hugging Face folder.

    The pixel statistics and the crop are CLIP's.

    Args:
        name: Architecture, a key of `ARCHITECTURES`.
        side: Height and width of an image in pixels. None: the architecture's default.
        folder: An existing folder.

    Raises:
        ConfigError: If the side is not a multiple of the patch size.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel

    side = side or ARCHITECTURES[name][1]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_encoder(CLIPVisionModel(vision_config(name, side)), folder)
    with writing_weights(folder):
        processor.save_pretrained(folder)


def vision_config(name: str, side: int) -> CLIPVisionConfig:
    """Return the transformers configuration of an architecture for images of `side` × `side` pixels.

    The layers are CLIP's, with a LayerNorm before the first layer and one after the pooled class token, and with the
    exact GELU, as OpenCLIP trains them.

    Raises:
        ConfigError: If the side is not a multiple of the patch size.
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
