"""Text towers, which map a text to one embedding: one shared tower or two, held as a sentence-transformers model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from index.files import InputError
from retriever.errors import ConfigError
from retriever.models.fingerprint import add_weights, without_provenance
from retriever.models.loading.folder import (
    ends_in_normalize,
    first_position,
    layer_depths,
    text_towers,
    transformer_layers,
)
from retriever.models.loading.text_settings import SIDES, Side, has_router, pools_prompts, prompt_of, text_tokenizer
from retriever.models.packed.attention import PackedLayout
from retriever.models.tokenizer import FixedLengthTokenizer, TextTokenizer, TokenizedTexts, packed_positions
from retriever.models.weights import writing_weights
from retriever.utils.device import to_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Towers(nn.Module):
    """The query tower and the passage tower; a single shared tower unless the model has a Router.

    The towers consist of the modules of a sentence-transformers model, so that `SentenceTransformer(path)` of the saved
    folder computes the same embeddings.

    Args:
        model: The sentence-transformers model.

    Raises:
        InputError: If the model cannot embed texts, or a prompt takes up all tokens of a text.
    """

    embeds_images = False
    """Whether the towers embed images beside texts; see retriever/models/modality.py."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        self.padding_free = False
        self.truncate_dim: int | None = None
        self._frozen: tuple[nn.Module, ...] = ()
        # Fingerprint of another model with the same passage tower (passage_side.py).
        self.passage_model: dict[str, str] | None = None
        self._transformers = text_towers(model)
        for side in SIDES:
            if "message" in self._transformer(side).modality_config:
                raise InputError("a model that reads its texts inside a chat template is not supported for encoding")
            self.check_prompt(self.prompt(side), side)

    @property
    def shared(self) -> bool:
        """Whether one tower serves both sides."""
        return not has_router(self.model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        """Dimension D of the embeddings: that of the model, or fewer after `truncated`."""
        return self.truncate_dim or self.full_dimension

    @property
    def full_dimension(self) -> int:
        """Dimension of the embeddings before truncation."""
        dimension = self.model.get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def normalized(self) -> bool:
        """Whether the embeddings have unit length."""
        return ends_in_normalize(list(self.model))

    def truncated(self, dim: int) -> Self:
        """Return towers with the same weights, of whose embeddings the first `dim` values are kept, at unit length.

        Args:
            dim: Number of values, from 1 to the model's dimension. That dimension changes nothing.

        Raises:
            InputError: If the model has fewer dimensions, or its embeddings do not have unit length.
        """
        if not 1 <= dim <= self.full_dimension:
            raise InputError(f"dim: expected a number from 1 to {self.full_dimension}, the model's own, found {dim}")
        if not self.normalized:
            raise InputError(f"dim: expected a model of embeddings of unit length, found one without, cut to {dim}")
        # Shares modules and weights.
        towers = copy.copy(self)
        towers.truncate_dim = None if dim == self.full_dimension else dim
        return towers

    @property
    def transformers(self) -> list[Any]:
        """The sentence-transformers Transformer module of each tower."""
        return list(dict.fromkeys(self._transformers.values()))

    @property
    def encoders(self) -> list[Any]:
        """The Hugging Face model of each tower, without duplicates."""
        return list(dict.fromkeys(transformer.auto_model for transformer in self.transformers))

    @property
    def encoders_by_side(self) -> dict[str, list[nn.Module]]:
        """Modules of the encoder of each side: "query" and "passage", or only "both" for a shared tower."""
        if len(self.encoders) == 1:
            return {"both": [self.encoders[0]]}
        return {"query": [self._transformer("query").auto_model], "passage": [self._transformer("document").auto_model]}

    def freeze(self, side: str, layers: int) -> None:
        """Freeze weights of the encoders. Frozen modules have no dropout in training.

        Args:
            side: "query" or "passage", whose encoder is frozen, or "none".
            layers: Number of layers of each encoder, from the input, that are frozen; with at least one, also the
                embeddings.

        Raises:
            ConfigError: If `side` is given for a shared tower, or an encoder has fewer layers.
        """
        frozen: list[nn.Module] = []
        if side != "none":
            if side not in self.encoders_by_side:
                raise ConfigError(f"model.freeze: expected none for a shared tower (model.shared), found {side}")
            frozen += self.encoders_by_side[side]
        for encoder in (module for modules in self.encoders_by_side.values() for module in modules):
            depths = layer_depths(encoder)
            if not layers or not any(depths.values()):
                continue
            blocks = transformer_layers(encoder)
            if layers > len(blocks):
                raise ConfigError(f"model.freeze_layers: expected at most {len(blocks)}, the layers, found {layers}")
            for parameter, depth in depths.items():
                if depth >= len(blocks) - layers:
                    parameter.requires_grad_(False)
            frozen += blocks[:layers]
        for module in frozen:
            module.requires_grad_(False)
        # In a tuple, so that they are not registered a second time.
        self._frozen = tuple(frozen)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for modules that `freeze` has frozen: they have no dropout."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def prompt(self, side: Side) -> str:
        """Return the prompt that is put before every query or passage, "" for none."""
        return prompt_of(self.model, side)

    def check_prompt(self, prompt: str, side: Side) -> None:
        """Check a prompt.

        Raises:
            InputError: If the prompt takes up all tokens of a text, or the pooling excludes prompts.
        """
        if prompt and not pools_prompts(self.model):
            raise InputError("a model whose pooling leaves out its prompt is not supported: clear its prompts")
        self.tokenizer(side).check_prompt(prompt)

    def tokenizer(self, side: Side) -> TextTokenizer:
        """Return the tokenizer of a side."""
        return text_tokenizer(self._transformer(side), side)

    def enable_packing(self) -> bool:
        """Switch to packed sequences: the texts of a micro-batch are concatenated without padding (see `packed/`).

        Returns:
            Whether all towers support it. If not, nothing changes.
        """
        from retriever.models.packed.families import enable_packing

        if any(isinstance(self.tokenizer(side), FixedLengthTokenizer) for side in SIDES):
            return False
        self.padding_free = self.padding_free or enable_packing(self.model)
        return self.padding_free

    def describe_frozen(self) -> str | None:
        """Return a line that describes the frozen weights, or None if there are none.

        Weights are frozen by the configuration, or if the folder holds an adapter and its base model.

        Raises:
            ConfigError: If all weights are frozen.
        """
        frozen = {name: weight for name, weight in self.model.named_parameters() if not weight.requires_grad}
        if not frozen:
            return None
        trainable = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        if not trainable:
            raise ConfigError("model: every weight is frozen (an adapter, model.freeze?): nothing would be trained")
        count = sum(weight.numel() for weight in frozen.values())
        return f"frozen: {count:,} weights in {len(frozen)} tensors ({next(iter(frozen))}, …); trained: {trainable:,}"

    def describe_padding(self) -> str | None:
        """Return a line if texts are padded on a GPU because the model does not support packing, otherwise None."""
        if self.device.type != "cuda" or self.padding_free:
            return None
        families = ", ".join(dict.fromkeys(encoder.config.model_type for encoder in self.encoders))
        return f"packed sequences are not supported for {families}: texts are sorted by length and padded"

    def compile_layers(self) -> None:
        """Compile the encoders' layers with torch.compile, with dynamic shapes.

        Layers of the same kind share their compiled code. Each kind is compiled three times: with a graph, without a
        graph, and for evaluation.
        """
        # ModernBERT has three kinds of layers. Beyond the limit torch silently runs layers uncompiled.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for encoder in self.encoders:
            for layer in transformer_layers(encoder):
                layer.compile(dynamic=True)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them.

        Raises:
            ConfigError: If the model does not support it.
        """
        for encoder in self.encoders:
            # The older name is deprecated and will be removed in transformers 6.
            newer = getattr(encoder, "activation_checkpointing_enable", None)
            try:
                (newer or encoder.gradient_checkpointing_enable)()
            except ValueError as error:
                raise ConfigError(f"gradient_checkpointing: {error}") from error

    def forward(self, features: dict[str, Any], side: Side) -> Tensor:
        """Return embeddings [batch, D], at least float32, of the features that `embed` prepares."""
        # A copy, because sentence-transformers' modules write into the dictionary.
        return self._prefix(self.model(dict(features), task=side)["sentence_embedding"])

    def _prefix(self, output: Tensor) -> Tensor:
        """At least float32; after `truncated`, the first values at unit length."""
        output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
        return output if self.truncate_dim is None else nn.functional.normalize(output[:, : self.truncate_dim], dim=1)

    def embed(self, texts: TokenizedTexts, rows: np.ndarray, side: Side) -> Tensor:
        """Compute the embeddings of one micro-batch.

        Args:
            texts: Tokenized texts.
            rows: int64 [rows], the texts of the micro-batch.
            side: Side whose tower is used.

        Returns:
            [rows, D], at least float32, on the towers' device.
        """
        tokenizer = self.tokenizer(side)
        if not self.padding_free:
            features = tokenizer.pad(texts, rows)
            return self({name: to_device(tensor, self.device) for name, tensor in features.items()}, side)
        input_ids, lengths = tokenizer.pack(texts, rows)
        layout = PackedLayout.of(lengths).to(self.device)
        first = first_position(self._transformer(side).auto_model)
        # RoBERTa-like models do not count pad tokens, which a text may contain literally.
        if first and (is_padding := input_ids == first - 1).any():
            positions = packed_positions(is_padding, np.maximum(lengths, 1))
            position_ids = to_device(torch.from_numpy(positions), self.device).long() + (first - 1)
        else:
            position_ids = torch.arange(len(input_ids), device=self.device) - layout.start + first
        features = {
            "input_ids": to_device(torch.from_numpy(input_ids), self.device).long()[None],
            "position_ids": position_ids[None],
        }
        return self({**features, "layout": layout}, side)

    def memory_probes(self, tokens: int, length: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """Return micro-batches with which memory can be measured.

        Args:
            tokens: Approximate number of tokens of a micro-batch.
            length: Tokens of each text, limited to the maximum length.

        Returns:
            For each kind of tower (number of tokens, function that embeds the micro-batch).
        """
        length = min(length, self.tokenizer("document").max_length or length)
        count = max(1, tokens // length)
        texts = TokenizedTexts(np.zeros(count * length, dtype=np.int32), np.arange(count + 1) * length)
        return [(count * length, lambda: self.embed(texts, np.arange(count), "document"))]

    def fingerprint(self) -> dict[str, str]:
        """Return {"sha256": …} over everything that embeddings depend on, and "dim" after `truncated`.

        That is weights, configurations, tokenizers, modules, maximum lengths and prompts. It identifies the passages'
        embeddings: of a model that was trained with `query_only`, it is that of the model it started from.
        """
        return self._with_dim(self.passage_model or {"sha256": self.sha256()})

    def sha256(self) -> str:
        """Return a sha256 over everything that embeddings of queries or passages depend on."""
        digest = hashlib.sha256()
        add_weights(digest, self.model.state_dict())
        for side in SIDES:
            texts = self.tokenizer(side)
            digest.update(f"{self.prompt(side)!r} {texts.max_length} {texts.settings()}\n".encode())
            settings = without_provenance(self._transformer(side).auto_model.config.to_dict())
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update(self.model.similarity_fn_name.encode())
        # The repr contains every module with its settings: pooling mode, projection, normalization.
        digest.update(repr(self.model).encode())
        return digest.hexdigest()

    def _with_dim(self, fingerprint: dict[str, str]) -> dict[str, str]:
        return fingerprint if self.truncate_dim is None else {**fingerprint, "dim": str(self.truncate_dim)}

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers model folder (safetensors) into an existing folder."""
        with writing_weights(folder):
            self.model.save(str(folder), create_model_card=False, safe_serialization=True)

    def _transformer(self, side: Side) -> Any:
        """Return the sentence-transformers Transformer module of a side."""
        return self._transformers[side]
