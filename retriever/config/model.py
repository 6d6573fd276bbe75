"""Configuration of the towers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from retriever.config.checks import MAX_LENGTH, check_at_least
from retriever.config.images import ImageConfig
from retriever.config.lora import LoraConfig


@dataclass(frozen=True)
class ModelConfig:
    """The towers: their weights, pooling and prompts."""

    name: str = ""
    """A sentence-transformers model or a Hugging Face encoder, as a local path or a hub name (may end in @revision).
    Empty: a new model, see model.architecture."""
    architecture: Annotated[dict[str, Any] | None, Suppress] = None
    """Train a new model from scratch: the fields of a Hugging Face configuration, including `model_type`. YAML only."""
    tokenizer: str | None = None
    """Tokenizer of a model from scratch, as a local path or a hub name. None: the tokenizer of model.name."""
    pooling: Literal["mean", "cls", "lasttoken"] | None = None
    """How the token vectors of a text are pooled into one. None: as saved with the model, otherwise the last token for
    a causal language model and the mean for any other encoder, as in sentence-transformers."""
    projection: int | None = None
    """Output dimension of a linear projection after pooling. None: no projection."""
    normalize: bool = True
    """Normalize embeddings to unit length. A model that was saved with normalization always normalizes."""
    shared: bool = True
    """Use one tower for queries and passages. False: two towers, initialized with the same weights."""
    max_length: int | None = None
    """Maximum length of a query or passage, in tokens; longer texts are truncated. None: the limits of the model."""
    dropout: float | None = None
    """Dropout probability of all layers of the towers in training. None: as configured in the model."""
    freeze: Literal["none", "query", "passage"] = "none"
    """Which encoder of a model with two towers (shared false) is frozen. Its projection is still trained."""
    freeze_layers: int = 0
    """Number of layers of each encoder, from the input, whose weights are frozen, with the embeddings. 0: none."""
    query_prompt: str | None = None
    """Text that is put before every query and is saved with the model. None: the prompt of the model."""
    passage_prompt: str | None = None
    """Text that is put before every passage and is saved with the model. None: the prompt of the model."""
    append_eos: bool = False
    """Append the EOS token to every text, for decoder models with last-token pooling whose tokenizer does not append
    it."""
    bidirectional: bool = False
    """Attention in both directions instead of causal attention, for decoder models."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        check_at_least(self, "model.", 1, "projection", "max_length", maximum=MAX_LENGTH)
        check_at_least(self, "model.", 0, "freeze_layers")
        if self.image.name:
            for name, value in {"lora.rank": self.lora.rank, "bidirectional": self.bidirectional}.items():
                if value:
                    raise ValueError(f"model.{name}: expected none with an image tower, found {value}")
        elif changed := [each.name for each in fields(self.image) if getattr(self.image, each.name) != each.default]:
            raise ValueError(f"model.image.{changed[0]}: expected the default without model.image.name")
        if self.image.into_text_space and self.projection is not None:
            raise ValueError(
                f"model.projection: expected none with model.image.into_text_space, found {self.projection}"
            )
        if self.image.into_text_space and not (self.name or self.architecture):
            raise ValueError("model.image.into_text_space: expected false for a model that has its own projections")
        if self.lora.rank and self.lora.save == "adapter" and not self.name:
            raise ValueError("model.lora.save: expected merged for a model from scratch, found adapter")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected a number from 0 to below 1, found {self.dropout}")
