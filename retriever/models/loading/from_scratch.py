"""Text towers from scratch: an architecture with random weights, and its tokenizer."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.files import InputError
from retriever.config.run import ModelConfig
from retriever.errors import ConfigError
from retriever.models.loading.folder import LOAD_ERRORS, disable_progress_bars, load_errors, load_model, one_line
from retriever.models.weights import save_encoder, writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_new_encoder(config: ModelConfig) -> SentenceTransformer:
    """A text tower from scratch, of `config.architecture`.

    Raises:
        ConfigError: there is no such architecture, or it cannot embed texts.
        InputError: the tokenizer cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_new_encoder(config, Path(folder))
        try:
            return load_model(folder, pooling=config.pooling)
        except InputError as error:
            raise ConfigError(f"model.architecture: {str(error).removeprefix(f'{folder}: ')}") from error


def write_new_encoder(config: ModelConfig, folder: Path) -> None:
    """Randomly initialised weights of `config.architecture`, with its tokenizer, as a Hugging Face folder.

    Raises:
        ConfigError: no tokenizer is named, or there is no such architecture.
        InputError: the tokenizer cannot be loaded.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    if not config.tokenizer:
        raise ConfigError("model.tokenizer: expected a path or hub name for a model from scratch")
    fields = dict(config.architecture or {})
    kind = fields.pop("model_type", None)
    kinds = list(CONFIG_MAPPING.keys())
    if kind not in kinds:
        near = ", ".join(difflib.get_close_matches(str(kind), kinds)) or "bert, roberta, modernbert"
        raise ConfigError(f"model.architecture: cannot be built: no model_type {kind!r}; near it: {near}")
    usual = AutoConfig.for_model(kind)
    _check_spelling(fields, usual)
    disable_progress_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise InputError(f"model.tokenizer: {config.tokenizer}: cannot be loaded: {one_line(error)}") from error
    # A tokenizer out of a model of pictures and texts would be loaded with an image processor, which is not here.
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None
    # Some families lay a tokenizer of their own, with tokens of its own, over the one that stands beside them.
    with writing_weights(folder):
        usual.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        fields.setdefault("vocab_size", len(tokenizer))
        # An architecture's own defaults are the token ids of the vocabulary that it was published with.
        for name in ("pad", "bos", "eos", "cls", "sep"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        settings = AutoConfig.for_model(kind, **fields)
        if settings.vocab_size < len(tokenizer):
            raise ConfigError(f"vocab_size: expected at least the tokenizer's {len(tokenizer)}")
        heads, shared = (getattr(settings, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
            default = "" if "num_key_value_heads" in fields else ", the default"
            raise ConfigError(f"num_key_value_heads: expected a divisor of {heads} heads, found {shared}{default}")
        model = AutoModel.from_config(settings)
    except load_errors() as error:
        raise ConfigError(f"model.architecture: cannot be built: {one_line(error)}") from error
    save_encoder(model, folder)
    with writing_weights(folder):
        tokenizer.save_pretrained(folder)


def _check_spelling(fields: dict[str, Any], usual: Any) -> None:
    """transformers keeps whatever name it is given, and the field that was meant stays as it is by default.

    Names unlike any are let through: some are read for the sake of older configurations.
    """
    known = {*vars(usual), *usual.to_dict(), *usual.attribute_map}
    known = {name for name in known if not name.startswith("_")}
    for name in sorted(name for name in fields.keys() - known if not str(name).endswith("_token_id")):
        if near := difflib.get_close_matches(str(name), known, n=1, cutoff=0.88):
            raise ConfigError(f"model.architecture: {name}: unknown to {usual.model_type}; did you mean {near[0]}?")
