"""The image tower and the text tower: pictures and texts in, embeddings of one space out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from retriever.config.run import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.folder import (
    config_folder,
    image_processor,
    is_image_text_model,
    join_encoders,
    load_image_text_model,
    reads_fixed_length,
    routes,
)
from retriever.models.images.patch_dropout import PatchDropout
from retriever.models.images.transforms import CLIP_STATISTICS, IMAGENET_STATISTICS, ImageTransform
from retriever.models.loading.adapt import set_text_options
from retriever.models.loading.checksums import verify_checksums
from retriever.models.loading.folder import Side
from retriever.models.tokenizer import FixedLengthTokenizer, TextTokenizer
from retriever.models.towers import Towers, without_provenance
from retriever.utils.device import to_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class ImageTextTowers(Towers):
    """A tower for pictures beside the one for texts, held and saved as one sentence-transformers model.

    As `Towers` it embeds texts, alike on both sides; `image_features` and `image_head` embed pictures.
    """

    def __init__(self, model: SentenceTransformer):
        from sentence_transformers import SentenceTransformer

        text, image = routes(model)
        prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
        text_model = SentenceTransformer(modules=text, device="cpu", prompts=prompts, similarity_fn_name="cosine")
        super().__init__(text_model)
        self.model = model
        # Held apart from the modules of this one: it shares every weight with `model`.
        self._text_model = (text_model,)
        self._image = tuple(image)
        # Projection and normalisation; what stands before them is the encoder, which a run may lock.
        self._image_trunk = next(i for i, m in enumerate(image) if type(m).__name__ in ("Dense", "Normalize"))
        self.transform = ImageTransform.of_processor(image_processor(image[0]))

    @property
    def shared(self) -> bool:
        """Whether one tower serves the texts of both sides: always."""
        return True

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        dimension = self._text_model[0].get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def transformers(self) -> list[Any]:
        """The sentence-transformers Transformer module of each tower."""
        return list(dict.fromkeys([self._image[0], *super().transformers]))

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture is to the image tower: its patches and the class token, where there is one."""
        patch = _vision_settings(self._image[0].auto_model.config).patch_size
        return (self.transform.size[0] // patch) * (self.transform.size[1] // patch) + 1

    def image_features(self, pixels: Tensor) -> Tensor:
        """What the image encoder makes of uint8 pixels [batch, 3, height, width], before its projection."""
        encoder = self._image[0].auto_model
        # Not every encoder casts its input to the dtype of its weights.
        values = self.transform.normalised(pixels).to(next(encoder.parameters()).dtype)
        features: dict[str, Any] = {"pixel_values": values, "modality": "image"}
        for module in self._image[: self._image_trunk]:
            features = module(features)
        return features["sentence_embedding"].float()

    def image_head(self, features: Tensor) -> Tensor:
        """Embeddings [batch, dimension] of unit length, fp32, from what `image_features` gave."""
        state: dict[str, Any] = {"sentence_embedding": features, "modality": "image"}
        for module in self._image[self._image_trunk :]:
            state = module(state)
        return state["sentence_embedding"].float()

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings [batch, dimension] of pixels on the host, or of features that `image_features` gave."""
        moved = to_device(pixels, self.device)
        return self({"pixels": moved}) if pixels.dtype == torch.uint8 else self.image_head(moved.float())

    def memory_probes(self, tokens: int, length: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """As of `Towers`, and one of pictures."""
        pictures = max(1, tokens // self.image_tokens)
        pixels = torch.zeros(pictures, 3, *self.transform.size, dtype=torch.uint8)
        return [
            *super().memory_probes(tokens, length),
            (pictures * self.image_tokens, lambda: self.embed_pixels(pixels)),
        ]

    @property
    def image_feature_dim(self) -> int:
        """Length of what `image_features` gives."""
        return int(self._image[self._image_trunk - 1].get_embedding_dimension())

    def tokenizer(self, side: Side) -> TextTokenizer:
        """What makes token ids of texts."""
        plain = super().tokenizer(side)
        if reads_fixed_length(self._transformer(side)):
            return FixedLengthTokenizer(plain.tokenizer, plain.max_length, plain.special_tokens)
        return plain

    def enable_packing(self) -> bool:
        """From now on lay the texts of a micro-batch end to end; False if the text tower cannot."""
        from retriever.models.packed.families import enable_packing

        self.padding_free = self.padding_free or enable_packing(self._text_model[0])
        return self.padding_free

    def forward(self, features: dict[str, Any], side: Side = "document") -> Tensor:
        """Embeddings [batch, dimension] of unit length: of pictures, where there are `pixels`, of texts otherwise."""
        if "pixels" in features:
            return self.image_head(self.image_features(features["pixels"]))
        output = self._text_model[0](dict(features), task=side)["sentence_embedding"]
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output

    def fingerprint(self) -> dict[str, str]:
        """What identifies the vectors, of pictures too: a sha256 as of `Towers`, over the image transform beside it."""
        settings = without_provenance(self._image[0].auto_model.config.to_dict())
        parts = [super().fingerprint(), asdict(self.transform), settings]
        return {"sha256": hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()}

    def image_fingerprint(self) -> str:
        """What identifies the features of pictures: a sha256 over the image encoder's weights and the transform."""
        digest = hashlib.sha256(json.dumps(asdict(self.transform), sort_keys=True).encode())
        for number, module in enumerate(self._image[: self._image_trunk]):
            settings = without_provenance(module.auto_model.config.to_dict()) if hasattr(module, "auto_model") else {}
            digest.update(json.dumps([repr(module), settings], sort_keys=True, default=str).encode())
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def set_statistics(self, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        """Normalise pixels by another mean and deviation, which the saved model then names."""
        self.transform = self.transform.with_statistics(statistics)
        processor = image_processor(self._image[0])
        processor.image_mean, processor.image_std = map(list, statistics)

    def lock(self, which: Literal["image", "text"]) -> None:
        """Take the weights of one encoder, not of its projection, out of training."""
        for module in self._encoder(which):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageTextTowers:
        """Training mode, but for locked encoders: no dropout in what does not learn."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters(recurse=True))
            if mode and own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers model folder (safetensors) into an existing folder."""
        self.tokenizer("document").reset_backend()
        super().save(folder)

    def _encoder(self, which: Literal["image", "text"]) -> list[nn.Module]:
        encoder = self._image[0].auto_model
        texts = self._transformer("document")
        if self._image[0] is not texts:
            return [self._image[0] if which == "image" else texts]
        names = ("vision_model", "visual_projection") if which == "image" else ("text_model", "text_projection")
        return [getattr(encoder, name) for name in names if hasattr(encoder, name)]


def load_image_text_towers(
    path_or_name: str, device: torch.device | str = "cpu", *, checked: Callable[[int], None] | None = None
) -> ImageTextTowers:
    """Load a folder or hub name with both towers for encoding, in evaluation mode and fp32.

    A run's model folder, any sentence-transformers folder of this kind, or a checkpoint of transformers: CLIP, SigLIP
    or fixed-size SigLIP 2 (not NaFlex), whose embeddings are transformers' own, scaled to unit length.

    Args:
        path_or_name: of the folder, or on the hub.
        device: where it embeds.
        checked: called with the number of bytes each time some of the model's files were checked against their sums.

    Raises:
        InputError: there is no such model, a file of it is damaged, or it does not embed pictures and texts.
    """
    verify_checksums(path_or_name, checked)
    return ImageTextTowers(load_image_text_model(path_or_name)).to(device).eval()


def build_image_text_towers(config: ModelConfig) -> ImageTextTowers:
    """Make the towers of a training run, on the CPU, in training mode and fp32.

    Raises:
        ConfigError: the configuration cannot be met.
        InputError: an encoder cannot be loaded.
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
        # Of a name that nothing has, this says so.
        model = load_image_text_model(image.name)
    set_text_options(model, [routes(model)[0][0]], config)
    towers = ImageTextTowers(model)
    if image.statistics != "processor":
        towers.set_statistics(CLIP_STATISTICS if image.statistics == "clip" else IMAGENET_STATISTICS)
    if image.lock != "none":
        towers.lock(image.lock)
    if image.patch_dropout:
        PatchDropout(image.patch_dropout).attach(towers._image[0].auto_model)
    return towers.train()


def _vision_settings(config: Any) -> Any:
    return getattr(config, "vision_config", config)
