"""Image–text towers: images and texts are mapped to embeddings of one space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.fingerprint import add_weights, without_provenance
from retriever.models.images.folder import (
    config_folder,
    image_patches,
    image_processor,
    is_image_text_model,
    join_encoders,
    load_image_text_model,
    modality_routes,
    needs_fixed_length,
)
from retriever.models.images.patch_dropout import PatchDropout
from retriever.models.images.transforms import CLIP_STATISTICS, IMAGENET_STATISTICS, ImageTransform
from retriever.models.loading.adapt import set_text_options
from retriever.models.loading.checksums import verify_checksums
from retriever.models.loading.folder import Side
from retriever.models.tokenizer import FixedLengthTokenizer, TextTokenizer
from retriever.models.towers import Towers
from retriever.utils.device import to_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class ImageTextTowers(Towers):
    """An image tower and a text tower, held and saved as one sentence-transformers model.

    Texts are embedded as by `Towers`, with one shared tower for both sides. Images are embedded by `image_features`
    followed by `image_head`.

    Args:
        model: An image–text model of sentence-transformers.

    Raises:
        InputError: If the model does not embed images and texts.
    """

    embeds_images = True

    def __init__(self, model: SentenceTransformer):
        from sentence_transformers import SentenceTransformer

        text, image = modality_routes(model)
        prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
        text_model = SentenceTransformer(modules=text, device="cpu", prompts=prompts, similarity_fn_name="cosine")
        super().__init__(text_model)
        self.model = model
        # In a tuple, so that it is not registered as a submodule: it shares every weight with `model`.
        self._text_model = (text_model,)
        self._image = tuple(image)
        # Number of modules of the image encoder, which a run may lock; the projection and normalization follow.
        self._encoder_depth = next(i for i, m in enumerate(image) if type(m).__name__ in ("Dense", "Normalize"))
        self.transform = ImageTransform.of_processor(image_processor(image[0]))

    @property
    def shared(self) -> bool:
        """Whether one tower serves the texts of both sides; always True."""
        return True

    @property
    def full_dimension(self) -> int:
        """Dimension of the embeddings before truncation."""
        dimension = self._text_model[0].get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def normalized(self) -> bool:
        """Whether the embeddings have unit length; always True."""
        return True

    @property
    def transformers(self) -> list[Any]:
        """The sentence-transformers Transformer module of each tower."""
        return list(dict.fromkeys([self._image[0], *super().transformers]))

    @property
    def encoders_by_side(self) -> dict[str, list[nn.Module]]:
        """Modules of the encoder of each side: "query", the texts, and "passage", the images."""
        return {"query": self._encoder("text"), "passage": self._encoder("image")}

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image: its patches, and 1 for a class token."""
        return image_patches(self._image[0].auto_model.config, self.transform.size) + 1

    @property
    def text_modules(self) -> list[Any]:
        """The modules of sentence-transformers that texts pass, in order."""
        return list(self._text_model[0])

    @property
    def image_modules(self) -> list[Any]:
        """The modules of sentence-transformers that images pass, in order."""
        return list(self._image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the outputs [batch, image_feature_dim] of the image encoder, before the projection, in float32.

        Args:
            pixels: uint8 [batch, 3, height, width] on the towers' device.
        """
        encoder = self._image[0].auto_model
        # Some encoders do not cast their input to the dtype of their weights.
        values = self.transform.normalize(pixels).to(next(encoder.parameters()).dtype)
        features: dict[str, Any] = {"pixel_values": values, "modality": "image"}
        for module in self._image[: self._encoder_depth]:
            features = module(features)
        return features["sentence_embedding"].float()

    def image_head(self, features: Tensor) -> Tensor:
        """Project and normalize the outputs of `image_features`: embeddings [batch, D] of unit length, float32."""
        state: dict[str, Any] = {"sentence_embedding": features, "modality": "image"}
        for module in self._image[self._encoder_depth :]:
            state = module(state)
        return self._prefix(state["sentence_embedding"])

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Compute embeddings [batch, D] of unit length.

        Args:
            pixels: uint8 [batch, 3, height, width], or precomputed outputs of `image_features` of another dtype,
                [batch, image_feature_dim]. On any device.
        """
        on_device = to_device(pixels, self.device)
        return self({"pixels": on_device}) if pixels.dtype == torch.uint8 else self.image_head(on_device.float())

    def memory_probes(self, tokens: int, length: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """Return the micro-batch of texts of `Towers.memory_probes`, and one of images."""
        images = max(1, tokens // self.image_tokens)
        pixels = torch.zeros(images, 3, *self.transform.size, dtype=torch.uint8)
        return [
            *super().memory_probes(tokens, length),
            (images * self.image_tokens, lambda: self.embed_pixels(pixels)),
        ]

    @property
    def image_feature_dim(self) -> int:
        """Dimension of the outputs of `image_features`."""
        return int(self._image[self._encoder_depth - 1].get_embedding_dimension())

    def tokenizer(self, side: Side) -> TextTokenizer:
        """Return the tokenizer of a side."""
        tokenizer = super().tokenizer(side)
        if needs_fixed_length(self._transformer(side)):
            return FixedLengthTokenizer(tokenizer.tokenizer, tokenizer.max_length, tokenizer.special_tokens)
        return tokenizer

    def enable_packing(self) -> bool:
        """Switch the text tower to packed sequences; returns False, without a change, if it does not support them."""
        from retriever.models.packed.families import enable_packing

        self.padding_free = self.padding_free or enable_packing(self._text_model[0])
        return self.padding_free

    def forward(self, features: dict[str, Any], side: Side = "document") -> Tensor:
        """Return embeddings [batch, D] of unit length, of images if `features` has "pixels", otherwise of texts."""
        if "pixels" in features:
            return self.image_head(self.image_features(features["pixels"]))
        return self._prefix(self._text_model[0](dict(features), task=side)["sentence_embedding"])

    def sha256(self) -> str:
        """Return a sha256 over everything that embeddings of texts and images depend on."""
        settings = without_provenance(self._image[0].auto_model.config.to_dict())
        parts = [{"sha256": super().sha256()}, self.transform.identity(), settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def image_fingerprint(self) -> str:
        """Return a sha256 over everything that the outputs of `image_features` depend on."""
        digest = hashlib.sha256(json.dumps(self.transform.identity(), sort_keys=True).encode())
        for number, module in enumerate(self._image[: self._encoder_depth]):
            settings = without_provenance(module.auto_model.config.to_dict()) if hasattr(module, "auto_model") else {}
            digest.update(json.dumps([repr(module), settings], sort_keys=True, default=str).encode())
            add_weights(digest, module.state_dict(), f"{number} ")
        return digest.hexdigest()

    def set_statistics(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        """Set the mean and standard deviation of the pixels, also in the image processor that is saved."""
        self.transform = self.transform.with_statistics(statistics)
        processor = image_processor(self._image[0])
        processor.image_mean, processor.image_std = map(list, statistics)

    def lock(self, which: Literal["image", "text"]) -> None:
        """Freeze the weights of one encoder, but not those of its projection."""
        for module in self._encoder(which):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for modules whose weights are all frozen: they have no dropout."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters(recurse=True))
            if mode and parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers model folder (safetensors) into an existing folder."""
        self.tokenizer("document").reset_backend()
        super().save(folder)

    def _encoder(self, which: Literal["image", "text"]) -> list[nn.Module]:
        encoder = self._image[0].auto_model
        text = self._transformer("document")
        if self._image[0] is not text:
            return [self._image[0] if which == "image" else text]
        names = ("vision_model", "visual_projection") if which == "image" else ("text_model", "text_projection")
        return [getattr(encoder, name) for name in names if hasattr(encoder, name)]


def load_image_text_towers(
    path_or_name: str, device: torch.device | str = "cpu", *, checked: Callable[[int], None] | None = None
) -> ImageTextTowers:
    """Load image–text towers for encoding, in evaluation mode and fp32.

    The model is a sentence-transformers folder, as training writes it, or a CLIP, SigLIP or fixed-size SigLIP 2
    checkpoint (not NaFlex). The embeddings of a checkpoint are those of transformers, scaled to unit length.

    Args:
        path_or_name: Model folder or hub name.
        device: Device of the towers. Default: "cpu".
        checked: Called with the number of bytes of model files whose checksums were verified since the last call.

    Raises:
        InputError: If there is no such model, a file is damaged, or the model does not embed images and texts.
    """
    verify_checksums(path_or_name, checked)
    return ImageTextTowers(load_image_text_model(path_or_name)).to(device).eval()


def build_image_text_towers(config: ModelConfig) -> ImageTextTowers:
    """Build the image–text towers of a training run, on the CPU, in training mode and fp32.

    Raises:
        ConfigError: If the encoders do not allow the configuration.
        InputError: If an encoder cannot be loaded.
    """
    image = config.image
    if config.name and config.architecture:
        raise ConfigError("model: expected a text tower by model.name or by model.architecture, found both")
    if config.name or config.architecture:
        model = join_encoders(config)
    elif image.is_new or (config_folder(image.name) and not is_image_text_model(image.name)):
        raise ConfigError(
            f"model: expected a text tower (model.name or model.architecture) beside the image tower {image.name}"
        )
    else:
        # Also reports a name that does not exist.
        model = load_image_text_model(image.name)
    set_text_options(model, [modality_routes(model)[0][0]], config)
    towers = ImageTextTowers(model)
    if image.statistics != "processor":
        towers.set_statistics(CLIP_STATISTICS if image.statistics == "clip" else IMAGENET_STATISTICS)
    if config.freeze != "none":
        raise ConfigError(
            f"model.freeze: expected none with an image tower, see model.image.lock; found {config.freeze}"
        )
    towers.freeze("none", config.freeze_layers)
    if image.lock != "none":
        towers.lock(image.lock)
    encoder = towers._image[0].auto_model
    if image.lock != "image" and any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            f"model.image.name: expected an encoder without batch normalization, whose embeddings depend on the "
            f"rest of the batch, or model.image.lock image; found {type(encoder).__name__}"
        )
    if image.patch_dropout:
        PatchDropout(image.patch_dropout).attach(encoder)
    return towers.train()
