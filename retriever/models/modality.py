"""Loading and building towers: the one choice between towers of texts and towers of images and texts.

`Towers` embeds texts. `ImageTextTowers`, its subclass, embeds images too. Code that works with either kind loads or
builds the towers here, and asks `embeds_images` where images need something more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.folder import is_image_text_model
from retriever.models.loading.adapt import adapt_model, set_text_options
from retriever.models.loading.checksums import verify_checksums
from retriever.models.loading.decoders import append_eos, attend_both_ways
from retriever.models.loading.folder import ends_in_normalize, load_model, text_towers
from retriever.models.loading.from_scratch import load_new_encoder
from retriever.models.loading.lora import add_lora
from retriever.models.passage_side import read_passage_model
from retriever.models.towers import Towers

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


def load_towers(
    path: str, device: torch.device | str = "cpu", *, checked: Callable[[int], None] | None = None
) -> Towers:
    """Load the towers of a model for encoding, in evaluation mode and fp32.

    Embeddings are always compared by inner product. If the similarity of the model is the cosine, which is
    sentence-transformers' default, a normalization to unit length is added unless the model has one.

    Args:
        path: Model folder or hub name.
        device: Device of the towers. Default: "cpu".
        checked: Called with the number of bytes of model files whose checksums were verified since the last call.

    Raises:
        InputError: If there is no such model, a file is damaged, the model does not embed texts, or its similarity is
            neither "cosine" nor "dot".
    """
    verify_checksums(path, checked)
    model = load_model(path, plain_texts=False)
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise InputError(
            f"{path}: expected a model whose similarity is cosine or dot, found {model.similarity_fn_name}"
        )
    if model.similarity_fn_name == "cosine" and not ends_in_normalize(list(model)):
        from sentence_transformers.sentence_transformer.modules import Normalize

        model.append(Normalize())
    try:
        towers = Towers(model).to(device).eval()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    towers.passage_model = read_passage_model(Path(path), towers)
    if towers.device.type == "cuda":
        towers.enable_packing()
    return towers


def build_towers(config: ModelConfig) -> Towers:
    """Build the towers of a training run, on the CPU, in training mode and fp32.

    Raises:
        ConfigError: If the model does not allow the configuration, or all its weights are frozen.
        InputError: If there is no such model, or it does not embed texts.
    """
    if bool(config.name) == bool(config.architecture):
        raise ConfigError("model: expected either model.name (folder or hub name) or model.architecture (from scratch)")
    model = load_new_encoder(config) if config.architecture else load_model(config.name, pooling=config.pooling)
    transformers = set(text_towers(model).values())
    if config.append_eos:
        append_eos(transformers)
    if config.bidirectional:
        attend_both_ways(transformers)
    model = adapt_model(model, config)
    set_text_options(model, set(text_towers(model).values()), config)
    towers = Towers(model)
    if config.lora.rank:
        add_lora(towers.encoders, config.lora)
    towers.freeze(config.freeze, config.freeze_layers)
    towers.train()
    # Raises an error if all weights are frozen.
    towers.describe_frozen()
    return towers
