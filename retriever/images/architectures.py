"""Vision transformers from scratch, by the names that the field gives them."""

from __future__ import annotations

from pathlib import Path

from retriever.config import ConfigError
from retriever.images.config import ARCHITECTURES
from retriever.weights import save_encoder, writing_weights


def write_new_vision_encoder(name: str, side: int | None, folder: Path) -> None:
    """Randomly initialised weights of an architecture, with its image processor, as a Hugging Face folder.

    The layers are CLIP's (a norm before the first of them, and one over the pooled class token) with the exact GELU,
    as OpenCLIP trains them; statistics and crop are CLIP's too.

    Args:
        side: of the square of pixels; a multiple of the patch size. None: the architecture's own.

    Raises:
        ConfigError: the side does not fit the patches.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    patch, default, width, layers, heads = ARCHITECTURES[name]
    side = side or default
    if side % patch:
        raise ConfigError(f"model.image.size: expected a multiple of {name}'s patches of {patch} pixels, found {side}")
    settings = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        hidden_act="gelu",
    )
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_encoder(CLIPVisionModel(settings), folder)
    with writing_weights(folder):
        processor.save_pretrained(folder)
