"""How the Transformer module of a sentence-transformers folder cuts and marks texts, read as a tokenizer of ours.

Each setting that the module can carry is honoured here or refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from index.files import InputError
from retriever.models.tokenizer import FixedLengthTokenizer, QueryExpansion, TextTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "document"]
SIDES: tuple[Side, Side] = ("query", "document")

# Longer than any text: tokenizers without a limit of their own say 1e30.
UNLIMITED = 2**31

# Of `processing_kwargs`: "text" and "common" concern texts, the others other inputs.
_GROUPS = ("text", "common", "audio", "image", "video", "chat_template")
# What may stand in them. Padding changes no vector, since it is masked; what it would change is found by the trial.
_KEYS = (
    *("max_length", "add_special_tokens", "truncation", "padding", "pad_to_multiple_of", "padding_side"),
    *("return_attention_mask", "return_token_type_ids", "return_tensors", "verbose"),
)


def text_tokenizer(transformer: Any, side: Side) -> TextTokenizer:
    """The tokenizer of a sentence-transformers Transformer as the module's own settings have it for a side.

    Raises:
        InputError: a setting cannot be honoured.
    """
    longest = transformer.max_seq_length
    task_length = getattr(transformer, "query_length" if side == "query" else "document_length", None)
    expansion = expansion_of(transformer) if side == "query" else None
    # Set on the module when it is loaded, where they matter (trial.py).
    types = getattr(transformer, "token_types", None)
    if not transformer.processing_kwargs and expansion is None:
        cut = _limited(longest if task_length is None else task_length)
        return TextTokenizer(transformer.tokenizer, cut, token_types=types)
    call = call_settings(transformer)
    own_length = call.get("max_length")
    if "max_length" in call and own_length is None:
        # It takes the place of the side's length all the same, and means the tokenizer's.
        task_length = None
    fill = None
    if expansion is not None:
        floor = expansion["length"]
        if expansion["strategy"] == "fixed":
            own_length = floor
        elif own_length is None and task_length is not None:
            own_length = max(task_length, floor)
        # Of those that the encoder does not attend to, nothing is pooled.
        fill = QueryExpansion(_expansion_token(transformer), floor) if expansion["attend"] else None
    lengths = (own_length, task_length, longest)
    cut = _limited(next((length for length in lengths if length is not None), None))
    special = bool(call.get("add_special_tokens", True))
    if call.get("return_attention_mask", True):
        return TextTokenizer(transformer.tokenizer, cut, special, fill, types)
    if call.get("padding") != "max_length" or cut is None:
        raise InputError("processing_kwargs: return_attention_mask: expected true, or padding to a max_length")
    return FixedLengthTokenizer(transformer.tokenizer, cut, special, fill)


def expansion_of(transformer: Any) -> dict[str, Any] | None:
    """How queries are filled up; none in most models, and in no module of an older sentence-transformers."""
    return getattr(transformer, "query_expansion", None)


def call_settings(transformer: Any) -> dict[str, Any]:
    """What a folder's `processing_kwargs` say of texts; common ones win, as in sentence-transformers.

    Raises:
        InputError: one of them is not known, or has a value that cannot be honoured.
    """
    given = transformer.processing_kwargs
    for group in given:
        if group not in _GROUPS:
            raise InputError(f"processing_kwargs: expected {', '.join(_GROUPS)}, found {group}")
    call = {**given.get("text", {}), **given.get("common", {})}
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
    """Raises InputError where a setting of the Transformer module cannot be honoured; the message names it."""
    if transformer.transformer_task != "feature-extraction":
        raise InputError(f"transformer_task: expected feature-extraction, found {transformer.transformer_task}")
    call = call_settings(transformer)
    for name in ("max_seq_length", "query_length", "document_length"):
        length = getattr(transformer, name, None)
        # Of a tokenizer without a limit, max_seq_length may be 1e30 as a float.
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
    """Raises InputError where the lengths of a side leave no token for the text."""
    for side in SIDES:
        # Where special tokens alone are more than a text may have, transformers does not cut it at all.
        tokenizer = text_tokenizer(transformer, side)
        if tokenizer.max_length is not None and tokenizer.max_length <= tokenizer.special_count:
            raise InputError(
                f"a {side}'s length: expected more than {tokenizer.special_count}, the number of special tokens, found "
                f"{tokenizer.max_length}"
            )


def limit_lengths(transformer: Any, limit: int) -> None:
    """Cut every length that the module's settings name to the positions that the encoder has.

    Raises:
        InputError: queries are expanded beyond them.
    """
    for name in ("query_length", "document_length"):
        if (getattr(transformer, name, None) or 0) > limit:
            setattr(transformer, name, limit)
    expansion = expansion_of(transformer)
    if expansion is not None and expansion["length"] > limit:
        raise InputError(f"query_expansion: length: expected at most {limit}, found {expansion['length']}")
    _replace_lengths(transformer, lambda length: min(length, limit))


def override_lengths(transformer: Any) -> None:
    """Let `max_seq_length` hold for both sides: a run's configuration says it in place of the folder.

    Raises:
        InputError: queries are expanded to more tokens.
    """
    expansion = expansion_of(transformer)
    if expansion is not None and expansion["length"] > transformer.max_seq_length:
        raise InputError(f"query_expansion: length: expected at most the maximum length, found {expansion['length']}")
    transformer.query_length = transformer.document_length = None
    _replace_lengths(transformer, lambda length: transformer.max_seq_length)


def prompt_of(model: SentenceTransformer, side: Side) -> str:
    """The text that a model puts before every query or passage; empty for none."""
    # The first name that is there, even if empty, as in sentence-transformers' encode_query and encode_document.
    names = ("query",) if side == "query" else ("document", "passage", "corpus")
    return next((model.prompts[name] or "" for name in names if name in model.prompts), "")


def pools_prompts(model: SentenceTransformer) -> bool:
    """Whether the tokens of a prompt are pooled like those of the text."""
    return all(getattr(module, "include_prompt", True) for module in model.modules())


def _replace_lengths(transformer: Any, replaced: Any) -> None:
    """Change `max_length` wherever `processing_kwargs` name one, in a copy of them."""
    transformer.processing_kwargs = {
        group: {**settings, "max_length": replaced(settings["max_length"])}
        if group in ("text", "common") and settings.get("max_length") is not None
        else settings
        for group, settings in transformer.processing_kwargs.items()
    }


def _limited(length: int | None) -> int | None:
    return length if length and length < UNLIMITED else None


def _expansion_token(transformer: Any) -> int:
    """The token that queries are filled up with; sentence-transformers has checked that there is one."""
    tokenizer, token = transformer.tokenizer, transformer.query_expansion["token"]
    if token is not None:
        return tokenizer.convert_tokens_to_ids(token)
    return tokenizer.eos_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
