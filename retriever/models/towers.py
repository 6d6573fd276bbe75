"""Towers: text in, one embedding out. One shared tower or two, held and saved as a sentence-transformers model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from index.files import InputError
from retriever.config.run import ModelConfig
from retriever.errors import ConfigError
from retriever.models.loading.adapt import adapt_model, set_text_options
from retriever.models.loading.folder import (
    ends_in_normalize,
    first_position,
    load_model,
    text_towers,
    transformer_layers,
)
from retriever.models.loading.from_scratch import load_new_encoder
from retriever.models.loading.hashes import verify_checksums
from retriever.models.loading.text_settings import SIDES, Side, pools_prompts, prompt_of, text_tokenizer
from retriever.models.packed.attention import PackedLayout
from retriever.models.sharded_tensors import full_tensor
from retriever.models.tokenizer import FixedLengthTokenizer, TextTokenizer, TokenizedTexts, packed_positions
from retriever.models.weights import writing_weights
from retriever.utils.device import to_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Of a transformer's configuration: where it came from and what it was written with, which its vectors do not show.
_PROVENANCE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class Towers(nn.Module):
    """The query tower and the passage tower (one and the same unless the model routes the two sides apart).

    `model` is the sentence-transformers model whose folder is what a run leaves behind, so what is trained here and
    what `SentenceTransformer(path)` computes are the same modules.

    Raises:
        InputError: the model or a prompt of it is not one that can embed texts.
    """

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        self.padding_free = False
        self._transformers = text_towers(model)
        for side in SIDES:
            if "message" in self._transformer(side).modality_config:
                raise InputError("a model that reads its texts inside a chat template is not supported for encoding")
            self.check_prompt(self.prompt(side), side)

    @property
    def shared(self) -> bool:
        """Whether one tower serves both sides."""
        return not hasattr(self.model[0], "sub_modules")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        dimension = self.model.get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def transformers(self) -> list[Any]:
        """The sentence-transformers Transformer module of each tower."""
        return list(dict.fromkeys(self._transformers.values()))

    @property
    def encoders(self) -> list[Any]:
        """The Hugging Face model of each tower, or the one that holds both."""
        return list(dict.fromkeys(transformer.auto_model for transformer in self.transformers))

    def prompt(self, side: Side) -> str:
        """The text that the model puts before every query or passage; empty for none."""
        return prompt_of(self.model, side)

    def check_prompt(self, prompt: str, side: Side) -> None:
        """Raises InputError for a prompt that leaves no room for texts, or that the model's pooling leaves out."""
        if prompt and not pools_prompts(self.model):
            raise InputError("a model whose pooling leaves out its prompt is not supported: clear its prompts")
        self.tokenizer(side).check_prompt(prompt)

    def tokenizer(self, side: Side) -> TextTokenizer:
        """What makes token ids of that side's texts."""
        return text_tokenizer(self._transformer(side), side)

    def enable_packing(self) -> bool:
        """From now on lay the texts of a micro-batch end to end, each attending to itself alone (padding_free/).

        Returns:
            Whether every tower can; if one cannot, nothing changes.
        """
        from retriever.models.packed.families import enable_packing

        if any(isinstance(self.tokenizer(side), FixedLengthTokenizer) for side in SIDES):
            return False
        self.padding_free = self.padding_free or enable_packing(self.model)
        return self.padding_free

    def describe_frozen(self) -> str | None:
        """What a user should hear once: that some weights are loaded frozen, as those of an adapter and its base are.

        Raises:
            ConfigError: all are, so that nothing would be trained.
        """
        frozen = {name: weight for name, weight in self.model.named_parameters() if not weight.requires_grad}
        if not frozen:
            return None
        left = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        if not left:
            raise ConfigError("model: every weight of the folder is frozen (an adapter?): nothing would be trained")
        count = sum(weight.numel() for weight in frozen.values())
        return f"frozen: {count:,} weights in {len(frozen)} tensors ({next(iter(frozen))}, …); trained: {left:,}"

    def describe_padding(self) -> str | None:
        """What a user should hear once: that texts are padded on a GPU, where those of most models are not."""
        if self.device.type != "cuda" or self.padding_free:
            return None
        families = ", ".join(dict.fromkeys(encoder.config.model_type for encoder in self.encoders))
        return f"models of the family {families} are not known without padding: texts are sorted by length and padded"

    def compile_layers(self) -> None:
        """Compile the encoders' layers by torch.compile, for micro-batches of any size.

        Layers of a kind share their code, and sizes are symbols in it: what is compiled is each kind of layer, three
        times, for a graph that is kept, for a first run without one, and for evaluation.
        """
        # ModernBERT has three kinds, and past its limit torch leaves layers as they are.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for encoder in self.encoders:
            for layer in transformer_layers(encoder):
                layer.compile(dynamic=True)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            ConfigError: the model cannot.
        """
        for encoder in self.encoders:
            # The newer name where there is one: the older warns, and leaves with transformers 6.
            newer = getattr(encoder, "activation_checkpointing_enable", None)
            try:
                (newer or encoder.gradient_checkpointing_enable)()
            except ValueError as error:
                raise ConfigError(f"gradient_checkpointing: {error}") from error

    def forward(self, features: dict[str, Any], side: Side) -> Tensor:
        """Embeddings [batch, dimension] in fp32 (in the weights' dtype outside autocast) of what `embed` makes."""
        # A copy: sentence-transformers' modules write their results into the dictionary they are given.
        output = self.model(dict(features), task=side)["sentence_embedding"]
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output

    def embed(self, texts: TokenizedTexts, rows: np.ndarray, side: Side) -> Tensor:
        """Embeddings [rows, dimension] of those texts, as one micro-batch."""
        tokenizer = self.tokenizer(side)
        if not self.padding_free:
            features = tokenizer.pad(texts, rows)
            return self({name: to_device(tensor, self.device) for name, tensor in features.items()}, side)
        input_ids, lengths = tokenizer.pack(texts, rows)
        layout = PackedLayout.of(lengths).to(self.device)
        place = torch.arange(len(input_ids), device=self.device) - layout.start
        first = first_position(self._transformer(side).auto_model)
        # RoBERTa and its kin do not count padding tokens, which a text may hold by name.
        if first and (padding := input_ids == first - 1).any():
            places = packed_positions(padding, np.maximum(lengths, 1))
            position_ids = to_device(torch.from_numpy(places), self.device).long() + (first - 1)
        else:
            position_ids = place + first
        features = {
            "input_ids": to_device(torch.from_numpy(input_ids), self.device).long()[None],
            "position_ids": position_ids[None],
        }
        return self({**features, "layout": layout}, side)

    def memory_probes(self, tokens: int, length: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """What shows the memory that graphs hold: micro-batches of about so many tokens, with their numbers of tokens.

        Args:
            tokens: of a micro-batch.
            length: tokens of each text, if texts may be that long.
        """
        length = min(length, self.tokenizer("document").max_length or length)
        texts = max(1, tokens // length)
        made = TokenizedTexts(np.zeros(texts * length, dtype=np.int32), np.arange(texts + 1) * length)
        return [(texts * length, lambda: self.embed(made, np.arange(texts), "document"))]

    def fingerprint(self) -> dict[str, str]:
        """What identifies the vectors: a sha256 over weights, configurations, tokenizers, modules, lengths, prompts."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content: Any = full_tensor(tensor.detach()).cpu().contiguous()
            digest.update(content.view(-1).view(torch.uint8).numpy())
        for side in SIDES:
            texts = self.tokenizer(side)
            digest.update(f"{self.prompt(side)!r} {texts.max_length} {texts.settings()}\n".encode())
            settings = _without_provenance(self._transformer(side).auto_model.config.to_dict())
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update(self.model.similarity_fn_name.encode())
        # The printed form holds every module with its settings: pooling mode, projection, normalisation.
        digest.update(repr(self.model).encode())
        return {"sha256": digest.hexdigest()}

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers model folder (safetensors) into an existing folder."""
        with writing_weights(folder):
            self.model.save(str(folder), create_model_card=False, safe_serialization=True)

    def _transformer(self, side: Side) -> Any:
        """The sentence-transformers Transformer module (tokenizer, longest length) of a side."""
        return self._transformers[side]


def _without_provenance(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of _PROVENANCE, those of its parts included."""
    return {
        name: _without_provenance(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _PROVENANCE
    }


def load_towers(
    path: str, device: torch.device | str = "cpu", *, checked: Callable[[int], None] | None = None
) -> Towers:
    """Load a model folder or hub name for encoding, in evaluation mode and fp32.

    Embeddings are compared by inner product, here and in every index. Of a model whose similarity is the cosine
    (sentence-transformers' default) and that does not normalise, they are therefore scaled to unit length.

    Args:
        path: of the folder, or the name.
        device: where it embeds.
        checked: called with the number of bytes each time some of the model's files were checked against their sums.

    Raises:
        InputError: there is no such model, a file of it is damaged, it does not embed texts, or its similarity is a
            distance.
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
    if towers.device.type == "cuda":
        towers.enable_packing()
    return towers


def build_towers(config: ModelConfig) -> Towers:
    """Make the towers of a training run, on the CPU, in training mode and fp32.

    Raises:
        ConfigError: the configuration cannot be met.
        InputError: there is no such model, or it does not embed texts.
    """
    if bool(config.name) == bool(config.architecture):
        raise ConfigError("model: expected either model.name (folder or hub name) or model.architecture (from scratch)")
    model = load_new_encoder(config) if config.architecture else load_model(config.name, pooling=config.pooling)
    model = adapt_model(model, config)
    set_text_options(model, set(text_towers(model).values()), config)
    towers = Towers(model).train()
    towers.describe_frozen()
    return towers
