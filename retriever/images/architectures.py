"""Vision transformers from scratch, by the names that the field gives them."""

from __future__ import annotations

from pathlib import Path

from retriever.config import ConfigError
from retriever.weights import writing_weights

# Patch size, default side of a picture, width, layers, heads (Dosovitskiy et al., arXiv 2010.11929, table 1; S from
# Touvron et al., arXiv 2012.12877). "tiny" is for machines without a GPU: 64 patches, 0.8 million parameters.
ARCHITECTURES = {
    "tiny": (8, 64, 128, 4, 4),
    "ViT-S/16": (16, 224, 384, 12, 6),
    "ViT-B/32": (32, 224, 768, 12, 12),
    "ViT-B/16": (16, 224, 768, 12, 12),
    "ViT-L/16": (16, 224, 1024, 24, 16),
    "ViT-L/14": (14, 224, 1024, 24, 16),
}


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
    with writing_weights(folder):
        CLIPVisionModel(settings).save_pretrained(folder)
        processor.save_pretrained(folder)
