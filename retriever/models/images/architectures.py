"""Vision encoders from scratch, by their usual names such as ViT-B/32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retriever.config.images import RESIDUAL_NETWORKS, TRANSFORMERS
from retriever.errors import ConfigError
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from transformers import BitConfig, CLIPVisionConfig


def write_new_vision_encoder(name: str, side: int | None, folder: Path) -> None:
    """Write a randomly initialized vision encoder and its image processor as a Hugging Face folder.

    The pixel statistics and the crop are CLIP's.

    Args:
        name: Architecture, one of `ARCHITECTURES`.
        side: Height and width of an image in pixels. None: the architecture's default.
        folder: An existing folder.

    Raises:
        ConfigError: If the side is not a multiple of the patch size.
    """
    from transformers import BitModel, CLIPImageProcessor, CLIPVisionModel

    if name in RESIDUAL_NETWORKS:
        side = side or RESIDUAL_NETWORKS[name][0]
        encoder: BitModel | CLIPVisionModel = BitModel(residual_config(name))
    else:
        side = side or TRANSFORMERS[name][1]
        encoder = CLIPVisionModel(vision_config(name, side))
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_encoder(encoder, folder)
    with writing_weights(folder):
        processor.save_pretrained(folder)


def residual_config(name: str) -> BitConfig:
    """Return the transformers configuration of a residual network."""
    from transformers import BitConfig

    widths = RESIDUAL_NETWORKS[name][1]
    return BitConfig(embedding_size=32, hidden_sizes=list(widths), depths=[1] * len(widths), num_groups=8)


def vision_config(name: str, side: int) -> CLIPVisionConfig:
    """Return the transformers configuration of a vision transformer for images of `side` × `side` pixels.

    The layers are CLIP's, with a LayerNorm before the first layer and one after the pooled class token, and with the
    exact GELU, as OpenCLIP trains them.

    Raises:
        ConfigError: If the side is not a multiple of the patch size.
    """
    from transformers import CLIPVisionConfig

    patch, _, width, layers, heads = TRANSFORMERS[name]
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
