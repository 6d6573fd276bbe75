"""Settings for decoder models as embedding models: an appended EOS token, and attention in both directions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

from retriever.errors import ConfigError

# Families whose `is_causal` selects the attention; their sequences can be packed too (packed/families.py).
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def append_eos(transformers: Iterable[Any]) -> None:
    """Make tokenizers append the EOS token to every text, in place, unless they do so already.

    The last token of a text is then the same for all texts, as in E5-Mistral (arXiv 2401.00368). The setting is saved
    in tokenizer.json, where every program finds it.

    Raises:
        ConfigError: If a tokenizer has no EOS token, or cannot be changed.
    """
    for transformer in transformers:
        tokenizer = transformer.tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError("model.append_eos: expected a tokenizer with an EOS token, found none")
        if _ends_in_eos(tokenizer):
            continue
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"model.append_eos: expected a fast tokenizer, found {type(tokenizer).__name__}")
        from tokenizers import processors

        eos = tokenizer.eos_token
        template = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
        before = backend.post_processor
        backend.post_processor = template if before is None else processors.Sequence([before, template])
        _check_saved(tokenizer)


def attend_both_ways(transformers: Iterable[Any]) -> None:
    """Replace causal attention of decoders by attention in both directions (LLM2Vec, arXiv 2404.05961), in place.

    The setting is saved in config.json.

    Raises:
        ConfigError: If a model is not of a family that supports it.
    """
    for transformer in transformers:
        encoder = transformer.auto_model
        if encoder.config.model_type not in DECODERS:
            raise ConfigError(
                f"model.bidirectional: expected one of {', '.join(DECODERS)}, found {encoder.config.model_type}"
            )
        encoder.config.is_causal = False
        for module in encoder.modules():
            if getattr(module, "is_causal", False) is True:
                module.is_causal = False


def _ends_in_eos(tokenizer: Any) -> bool:
    return bool(tokenizer("a").input_ids[-1] == tokenizer.eos_token_id)


def _check_saved(tokenizer: Any) -> None:
    """Check that the saved tokenizer still appends EOS: some classes replace what tokenizer.json says."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not _ends_in_eos(tokenizer) or not _ends_in_eos(saved):
        raise ConfigError(f"model.append_eos: not supported by {type(tokenizer).__name__}")
