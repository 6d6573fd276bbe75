"""Text settings of a sentence-transformers Transformer module: lengths, special tokens, query expansion, prompts.

They are translated into a `TextTokenizer`. Every setting is supported or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from index.files import InputError
from retriever.models.tokenizer import FixedLengthTokenizer, QueryExpansion, TextTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "document"]
SIDES: tuple[Side, Side] = ("query", "document")

# Lengths from here on mean no limit; tokenizers without a limit have 1e30.
UNLIMITED = 2**31

# Keys of `processing_kwargs`. Only "text" and "common" apply to texts.
_GROUPS = ("text", "common", "audio", "image", "video", "chat_template")
# Supported keys of "text" and "common". Padding is masked; reference_check.py finds models for which it matters.
_KEYS = (
    *("max_length", "add_special_tokens", "truncation", "padding", "pad_to_multiple_of", "padding_side"),
    *("return_attention_mask", "return_token_type_ids", "return_tensors", "verbose"),
)


def text_tokenizer(transformer: Any, side: Side) -> TextTokenizer:
    """Return the tokenizer of a side, with the settings of a sentence-transformers Transformer module.

    Raises:
        InputError: If a setting is not supported.
    """
    max_seq_length = transformer.max_seq_length
    side_length = getattr(transformer, "query_length" if side == "query" else "document_length", None)
    settings = expansion_of(transformer) if side == "query" else None
    # `reference_check` sets this attribute if token types change the embeddings.
    types = getattr(transformer, "token_types", None)
    if not transformer.processing_kwargs and settings is None:
        max_length = _limited(max_seq_length if side_length is None else side_length)
        return TextTokenizer(transformer.tokenizer, max_length, token_types=types)
    call = call_settings(transformer)
    call_length = call.get("max_length")
    if "max_length" in call and call_length is None:
        # A null max_length overrides the side's length and stands for max_seq_length.
        side_length = None
    expansion = None
    if settings is not None:
        length = settings["length"]
        if settings["strategy"] == "fixed":
            call_length = length
        elif call_length is None and side_length is not None:
            call_length = max(side_length, length)
        # Expansion tokens that the encoder does not attend to are not pooled either, so they have no effect.
        expansion = QueryExpansion(_expansion_token(transformer), length) if settings["attend"] else None
    lengths = (call_length, side_length, max_seq_length)
    max_length = _limited(next((length for length in lengths if length is not None), None))
    special = bool(call.get("add_special_tokens", True))
    if call.get("return_attention_mask", True):
        return TextTokenizer(transformer.tokenizer, max_length, special, expansion, types)
    if call.get("padding") != "max_length" or max_length is None:
        raise InputError("processing_kwargs: return_attention_mask: expected true, or padding to a max_length")
    return FixedLengthTokenizer(transformer.tokenizer, max_length, special, expansion)


def expansion_of(transformer: Any) -> dict[str, Any] | None:
    """Return the settings of query expansion, or None. Older sentence-transformers do not have the attribute."""
    return getattr(transformer, "query_expansion", None)


def call_settings(transformer: Any) -> dict[str, Any]:
    """Return the `processing_kwargs` for texts. As in sentence-transformers, "common" overrides "text".

    Raises:
        InputError: If a key or a value is not supported.
    """
    groups = transformer.processing_kwargs
    for group in groups:
        if group not in _GROUPS:
            raise InputError(f"processing_kwargs: expected {', '.join(_GROUPS)}, found {group}")
    call = {**groups.get("text", {}), **groups.get("common", {})}
    for key in call:
        if key not in _KEYS:
            raise InputError(f"processing_kwargs: {key}: not supported; expected {', '.join(_KEYS)}")
    if call.get("truncation", True) not in (True, "longest_first", "only_first"):
        raise InputError(f"processing_kwargs: truncation: expected true, found {call['truncation']!r}")
    if call.get("return_tensors", "pt") != "pt":
        raise InputError(f"processing_kwargs: return_tensors: expected pt, found {call['return_tensors']!r}")
    length = call.get("max_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise InputError(f"processing_kwargs: max_length: expected a number above 0, found {length!r}")
    return call


def check_settings(transformer: Any) -> None:
    """Check that all settings of a Transformer module are supported.

    Raises:
        InputError: If one is not; the message names it.
    """
    if transformer.transformer_task != "feature-extraction":
        raise InputError(f"transformer_task: expected feature-extraction, found {transformer.transformer_task}")
    call = call_settings(transformer)
    for name in ("max_seq_length", "query_length", "document_length"):
        length = getattr(transformer, name, None)
        # For tokenizers without a limit, max_seq_length may be the float 1e30.
        kinds = (int, float) if name == "max_seq_length" else (int,)
        if length is not None and (not isinstance(length, kinds) or isinstance(length, bool) or length < 1):
            raise InputError(f"{name}: expected a number above 0, found {length!r}")
    if expansion_of(transformer) is not None:
        if transformer.tokenizer.padding_side != "right":
            raise InputError("query_expansion: not supported for a tokenizer that pads on the left")
        for name in ("max_length", "padding"):
            if name in transformer.processing_kwargs.get("common", {}):
                raise InputError(f"query_expansion: expected no {name} among the common processing_kwargs")
    if not call.get("return_attention_mask", True):
        fixed = [text_tokenizer(transformer, side).max_length for side in SIDES]
        if expansion_of(transformer) is not None or fixed[0] != fixed[1]:
            raise InputError("processing_kwargs: return_attention_mask: expected true, or one length for both sides")


def check_lengths(transformer: Any) -> None:
    """Check that the maximum length of each side leaves at least one token for the text.

    Raises:
        InputError: If it does not.
    """
    for side in SIDES:
        # If the special tokens exceed the maximum length, transformers does not truncate at all.
        tokenizer = text_tokenizer(transformer, side)
        if tokenizer.max_length is not None and tokenizer.max_length <= tokenizer.special_count:
            raise InputError(
                f"a {side}'s length: expected more than {tokenizer.special_count}, the number of special tokens, found "
                f"{tokenizer.max_length}"
            )


def limit_lengths(transformer: Any, limit: int) -> None:
    """Limit all lengths in the module's settings to `limit` tokens, in place.

    Raises:
        InputError: If queries are expanded to more tokens.
    """
    for name in ("query_length", "document_length"):
        if (getattr(transformer, name, None) or 0) > limit:
            setattr(transformer, name, limit)
    expansion = expansion_of(transformer)
    if expansion is not None and expansion["length"] > limit:
        raise InputError(f"query_expansion: length: expected at most {limit}, found {expansion['length']}")
    _replace_lengths(transformer, lambda length: min(length, limit))


def override_lengths(transformer: Any) -> None:
    """Replace all lengths in the module's settings by `max_seq_length`, in place.

    Raises:
        InputError: If queries are expanded to more tokens.
    """
    expansion = expansion_of(transformer)
    if expansion is not None and expansion["length"] > transformer.max_seq_length:
        raise InputError(f"query_expansion: length: expected at most the maximum length, found {expansion['length']}")
    transformer.query_length = transformer.document_length = None
    _replace_lengths(transformer, lambda length: transformer.max_seq_length)


def has_router(model: SentenceTransformer) -> bool:
    """Whether the first module of a model is a Router, so that its routes may have different towers."""
    from sentence_transformers.base.modules import Router

    return isinstance(model[0], Router)


def prompt_of(model: SentenceTransformer, side: Side) -> str:
    """Return the prompt of a side, "" for none.

    As in sentence-transformers' `encode_query` and `encode_document`, the first existing name is used, even if its
    prompt is empty.
    """
    names = ("query",) if side == "query" else ("document", "passage", "corpus")
    return next((model.prompts[name] or "" for name in names if name in model.prompts), "")


def pools_prompts(model: SentenceTransformer) -> bool:
    """Whether the pooling includes the tokens of the prompt."""
    return all(getattr(module, "include_prompt", True) for module in model.modules())


def _replace_lengths(transformer: Any, replacement: Callable[[int], int]) -> None:
    """Replace every `max_length` in `processing_kwargs`, which are copied."""
    transformer.processing_kwargs = {
        group: {**settings, "max_length": replacement(settings["max_length"])}
        if group in ("text", "common") and settings.get("max_length") is not None
        else settings
        for group, settings in transformer.processing_kwargs.items()
    }


def _limited(length: int | None) -> int | None:
    return length if length and length < UNLIMITED else None


def _expansion_token(transformer: Any) -> int:
    """Return the id of the expansion token. sentence-transformers has checked that there is one."""
    tokenizer, token = transformer.tokenizer, transformer.query_expansion["token"]
    if token is not None:
        return tokenizer.convert_tokens_to_ids(token)
    return tokenizer.eos_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
