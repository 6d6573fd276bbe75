"""Text towers from scratch: an architecture with random weights and a given tokenizer."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.loading.checks import too_many
from retriever.models.loading.errors import disable_progress_bars, load_errors, one_line
from retriever.models.loading.folder import load_model
from retriever.models.loading.hub import local_model
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_new_encoder(config: ModelConfig) -> SentenceTransformer:
    """Return a randomly initialized text tower of `config.architecture`, on the CPU in fp32.

    Raises:
        ConfigError: If there is no such architecture, or it cannot embed texts.
        InputError: If the tokenizer cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_new_encoder(config, Path(folder))
        try:
            return load_model(folder, pooling=config.pooling)
        except InputError as error:
            raise ConfigError(f"model.architecture: {str(error).removeprefix(f'{folder}: ')}") from error


def write_new_encoder(config: ModelConfig, folder: Path) -> None:
    """Write a randomly initialized encoder of `config.architecture` and its tokenizer as a Hugging Face folder.

    Raises:
        ConfigError: If no tokenizer is named, or there is no such architecture.
        InputError: If the tokenizer cannot be loaded.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    if not config.tokenizer:
        raise ConfigError("model.tokenizer: expected a path or hub name for a model from scratch")
    fields = dict(config.architecture or {})
    if found := too_many(fields):
        raise ConfigError(f"model.architecture: {found}")
    kind = fields.pop("model_type", None)
    kinds = list(CONFIG_MAPPING.keys())
    if kind not in kinds:
        near = ", ".join(difflib.get_close_matches(str(kind), kinds)) or "bert, roberta, modernbert"
        raise ConfigError(f"model.architecture: cannot be built: no model_type {kind!r}; near it: {near}")
    defaults = AutoConfig.for_model(kind)
    _check_spelling(fields, defaults)
    disable_progress_bars()
    location = local_model(config.tokenizer, only=("*.json", "*.txt", "*.model"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except load_errors() as error:
        raise InputError(f"model.tokenizer: {config.tokenizer}: cannot be loaded: {one_line(error)}") from error
    # The tokenizer of an image–text model names a processor class, which would need an image processor.
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None
    # Some families wrap the tokenizer in a class of their own that adds tokens, so it is loaded again with the config.
    with writing_weights(folder):
        defaults.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        fields.setdefault("vocab_size", len(tokenizer))
        # The defaults of an architecture are token ids of the vocabulary with which it was published.
        for name in ("pad", "bos", "eos", "cls", "sep"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        settings = AutoConfig.for_model(kind, **fields)
        if settings.vocab_size < len(tokenizer):
            raise ConfigError(f"vocab_size: expected at least the tokenizer's {len(tokenizer)}")
        heads, key_heads = (getattr(settings, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(key_heads, int) and (key_heads < 1 or heads % key_heads):
            default = "" if "num_key_value_heads" in fields else ", the default"
            raise ConfigError(f"num_key_value_heads: expected a divisor of {heads} heads, found {key_heads}{default}")
        model = AutoModel.from_config(settings)
    except load_errors() as error:
        raise ConfigError(f"model.architecture: cannot be built: {one_line(error)}") from error
    save_encoder(model, folder)
    with writing_weights(folder):
        tokenizer.save_pretrained(folder)


def _check_spelling(fields: dict[str, Any], defaults: Any) -> None:
    """Refuse unknown fields that resemble a known one; transformers would silently ignore them.

    Other unknown fields are accepted, because some are read for compatibility with older configurations.
    """
    known = {*vars(defaults), *defaults.to_dict(), *defaults.attribute_map}
    known = {name for name in known if not name.startswith("_")}
    for name in sorted(name for name in fields.keys() - known if not str(name).endswith("_token_id")):
        if near := difflib.get_close_matches(str(name), known, n=1, cutoff=0.88):
            raise ConfigError(f"model.architecture: {name}: unknown to {defaults.model_type}; did you mean {near[0]}?")
