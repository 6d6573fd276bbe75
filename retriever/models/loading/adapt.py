"""Applying a run's configuration to a loaded model: pooling, projection, lengths, dropout, prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.loading.folder import (
    ends_in_normalize,
    position_limit,
    read_plain_texts,
    text_towers,
)
from retriever.models.loading.reference_check import sample_embeddings
from retriever.models.loading.text_settings import has_router, override_lengths, text_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def set_text_options(model: SentenceTransformer, transformers: Iterable[Any], config: ModelConfig) -> None:
    """Apply `max_length`, `dropout` and the prompts of a configuration to a model, in place.

    Args:
        model: The model.
        transformers: Its Transformer modules for texts.
        config: Fields that are None leave the model's own settings.

    Raises:
        ConfigError: If `max_length` is out of range.
    """
    for transformer in transformers:
        read_plain_texts(transformer)
        if config.max_length is not None:
            _set_max_length(transformer, config.max_length)
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    for name, prompt in (("query", config.query_prompt), ("document", config.passage_prompt)):
        if prompt is not None:
            model.prompts[name] = prompt


def adapt_model(model: SentenceTransformer, config: ModelConfig) -> SentenceTransformer:
    """Return a model with the pooling, projection, normalization and separate towers of a configuration.

    Raises:
        ConfigError: If the model does not allow them.
        InputError: If the resulting modules do not fit together.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    modules: list[Any] = list(model)
    routed = has_router(model)
    if routed and (config.pooling or config.projection):
        raise ConfigError(f"{config.name}: has two towers already; pooling and projection are the folder's own")
    normalized = ends_in_normalize(modules)
    poolings = [i for i, module in enumerate(modules) if isinstance(module, Pooling)]
    if config.pooling:
        if len(poolings) != 1:
            raise ConfigError(f"model.pooling: expected none for {config.name}, which has {len(poolings)} poolings")
        _replace_pooling(modules, poolings[0], config.pooling)
    if config.projection:
        modules = modules[:-1] if normalized else modules
        width = SentenceTransformer(modules=modules, device="cpu").get_embedding_dimension() or 0
        modules.append(Dense(width, config.projection, bias=False, activation_function=nn.Identity()))
    normalized = normalized or config.normalize
    if normalized and not ends_in_normalize(modules):
        modules.append(Normalize())
    if not config.shared and not routed:
        modules = [Router.for_query_document(modules, copy.deepcopy(modules))]
    adapted = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={name: prompt or "" for name, prompt in model.prompts.items()},
        default_prompt_name=model.default_prompt_name,
        # The similarity that the loss uses, whatever the folder states.
        similarity_fn_name="cosine" if normalized else "dot",
    )
    for side, transformer in text_towers(adapted).items():
        sample_embeddings(adapted, transformer, side, config.name or "model.architecture")
    return adapted


def _replace_pooling(modules: list[Any], position: int, mode: str) -> None:
    """Replace the pooling mode, in place; the following modules must accept the new dimension."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    old = modules[position]
    modules[position] = new = Pooling(old.embedding_dimension, mode, include_prompt=old.include_prompt)
    before, after = old.pooling_output_dimension, new.pooling_output_dimension
    following = [type(module).__name__ for module in modules[position + 1 :] if not isinstance(module, Normalize)]
    if before != after and following:
        raise ConfigError(
            f"model.pooling: {mode} gives {after} dimensions, but the {following[0]} of the folder expects {before}"
        )


def _set_max_length(transformer: Any, max_length: int) -> None:
    special = text_tokenizer(transformer, "document").special_count
    limit = position_limit(transformer)
    if max_length <= special:
        raise ConfigError(
            f"model.max_length: expected at least {special + 1}, since {special} tokens are special, found {max_length}"
        )
    if limit is not None and max_length > limit:
        raise ConfigError(f"model.max_length: expected at most {limit}, the model's own limit, found {max_length}")
    transformer.max_seq_length = max_length
    try:
        override_lengths(transformer)
    except InputError as error:
        raise ConfigError(f"model.max_length: {error}") from error


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of all Dropout modules, and the rates that attention modules hold as float attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith("dropout"):
                setattr(module, name, rate)
