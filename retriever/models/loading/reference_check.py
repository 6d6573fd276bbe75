"""Check on loading: our embeddings of a few texts must equal those of sentence-transformers.

A difference would affect stores, indexes and training, so such a model is refused. The check finds unsupported
settings, modules that do not fit together, and models whose embeddings depend on the other texts of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index.files import InputError
from retriever.models.loading.errors import load_errors, one_line
from retriever.models.loading.text_settings import (
    SIDES,
    Side,
    call_settings,
    has_router,
    pools_prompts,
    prompt_of,
    text_tokenizer,
)
from retriever.models.tokenizer import FixedLengthTokenizer, TokenTypes, restore_truncation

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# The lengths differ, so that one text is padded. There are upper case, digits and characters that are normalized.
TEXTS = ("a cat", "How tall is the Eiffel Tower? 330 m, says “Ångström”.")
# Larger than differences from the order of summation in a deep fp32 model.
TOLERANCE = 2e-5
# Truncation is checked with a text longer than the maximum length, unless that is this many tokens or more.
MAX_CHECKED_LENGTH = 2**16


class ReferenceCheck:
    """Embeddings of a few texts by sentence-transformers, taken before the model is changed, to compare with ours.

    Args:
        model: A model as sentence-transformers loaded it.
        transformers: The Transformer module of each side.
        path: Name of the model in messages.
        for_training: Whether the model will be saved with padding on the right. If so, padding on the left is checked
            in `check`, after the tokenizer has been changed. Default: False.

    Raises:
        InputError: If the model cannot embed the texts, or gives a text another embedding beside other texts.
    """

    def __init__(
        self, model: SentenceTransformer, transformers: dict[Side, Any], path: str, *, for_training: bool = False
    ):
        self.path, self.for_training = path, for_training
        self.transformers = transformers
        # A shared tower computes the same on both sides; only the token ids of the sides can differ.
        self.sides: Sequence[Side] = SIDES if has_router(model) else SIDES[:1]
        try:
            with self._restore_truncation():
                # One text at a time, so that there is no padding.
                self.embeddings = {
                    side: torch.cat([_reference_embeddings(model, side, [text]) for text in TEXTS])
                    for side in self.sides
                }
                if not all(bool(embeddings.isfinite().all()) for embeddings in self.embeddings.values()):
                    raise InputError(f"{path}: its embeddings are not finite")
                if not for_training:
                    self._check_left_padding(model)
        except InputError:
            raise
        except load_errors() as error:
            raise InputError(f"{path}: cannot embed texts: {one_line(error)}") from error

    def check(self, model: SentenceTransformer) -> None:
        """Compare our token ids and embeddings with those of sentence-transformers.

        Raises:
            InputError: If they differ.
        """
        with self._restore_truncation():
            if self.for_training:
                self._check_left_padding(model)
            self._check_tokens(model)
            self._check_embeddings(model)

    def _restore_truncation(self) -> contextlib.AbstractContextManager[None]:
        return restore_truncation(transformer.tokenizer for transformer in self.transformers.values())

    def _check_left_padding(self, model: SentenceTransformer) -> None:
        """Check that padding on the left does not shift positions. We pad on the right."""
        for side in self.sides:
            transformer = self.transformers[side]
            if "left" in (transformer.tokenizer.padding_side, call_settings(transformer).get("padding_side")):
                self._check_batch(model, side, "its tokenizer pads on the left")

    def _check_batch(self, model: SentenceTransformer, side: Side, reason: str) -> None:
        """Check that sentence-transformers gives a text the same embedding beside a longer one."""
        if _differ(_reference_embeddings(model, side, list(TEXTS)), self.embeddings[side]):
            raise InputError(f"{self.path}: a text's embedding depends on the other texts of its batch: {reason}")

    def _check_tokens(self, model: SentenceTransformer) -> None:
        """Compare token ids. Done in `check`, because lengths are limited to the available positions before it."""
        for side in SIDES:
            tokenizer = text_tokenizer(self.transformers[side], side)
            if isinstance(tokenizer, FixedLengthTokenizer):
                continue
            reference = _reference_tokens(model, self.transformers[side], side)
            tokens = tokenizer(list(reference))
            for number, (text, expected) in enumerate(reference.items()):
                ids = tokens.ids[tokens.offsets[number] : tokens.offsets[number + 1]]
                if not np.array_equal(ids, expected):
                    raise InputError(
                        f"{self.path}: expected the token ids of sentence-transformers for {text!r:.40} as a {side}, "
                        f"found others; its tokenizer, or a setting of it, is not supported"
                    )

    def _check_embeddings(self, model: SentenceTransformer) -> None:
        for side in self.sides:
            expected = self.embeddings[side]
            embeddings = sample_embeddings(model, self.transformers[side], side, self.path)
            if embeddings.shape != expected.shape:
                raise InputError(
                    f"{self.path}: expected embeddings of {expected.shape[1]} dimensions, found {embeddings.shape[1]}"
                )
            if _differ(embeddings, expected) and (types := _token_types(model, self.transformers[side], side)):
                self.transformers[side].token_types = types
                embeddings = sample_embeddings(model, self.transformers[side], side, self.path)
            if _differ(embeddings, expected):
                self._check_batch(model, side, "its encoder or a module mixes padding into texts")
                raise InputError(
                    f"{self.path}: expected the embeddings of sentence-transformers, found others; a module, a setting "
                    f"or an output of the tokenizer other than token ids is not supported"
                )


def sample_embeddings(model: SentenceTransformer, transformer: Any, side: Side, path: str) -> Tensor:
    """Return our embeddings of `TEXTS` as one padded batch, [len(TEXTS), D].

    Raises:
        InputError: If the modules do not fit together, or D is not the dimension that the model states.
    """
    tokenizer, prompt = text_tokenizer(transformer, side), _prompt(model, side)
    with restore_truncation([transformer.tokenizer]):
        features = tokenizer.pad(tokenizer([prompt + text for text in TEXTS]), np.arange(len(TEXTS)))
    dimension = model.get_embedding_dimension()
    model.eval()
    try:
        with torch.no_grad():
            embeddings = model(dict(features), task=side)["sentence_embedding"]
    except load_errors() as error:
        raise InputError(f"{path}: its modules do not fit each other: {one_line(error)}") from error
    if embeddings.ndim != 2 or embeddings.shape[1] != dimension:
        raise InputError(
            f"{path}: expected embeddings of {dimension} dimensions, as its modules say, found {embeddings.shape[-1]}"
        )
    return embeddings


def _reference_embeddings(model: SentenceTransformer, side: Side, texts: list[str]) -> Tensor:
    """Embeddings as by `encode_query` and `encode_document`."""
    model.eval()
    # Not inference mode: modules may cache tensors that training needs later.
    with torch.no_grad():
        features = model.preprocess(texts, prompt=_prompt(model, side), task=side)
        return model(features, task=side)["sentence_embedding"][:, : model.truncate_dim]


def _token_types(model: SentenceTransformer, transformer: Any, side: Side) -> TokenTypes | None:
    """Return the tokenizer's token types; None if it has none, or gives one text several."""
    features = model.preprocess([TEXTS[0]], task=side)
    if "token_type_ids" not in features or isinstance(text_tokenizer(transformer, side), FixedLengthTokenizer):
        return None
    mask = features["attention_mask"][0].bool()
    ids, types = features["input_ids"][0][mask].tolist(), features["token_type_ids"][0][mask].tolist()
    special = transformer.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    positions = [position for position, is_special in enumerate(special) if not is_special]
    start, end = positions[0], positions[-1] + 1
    if len({*types[start:end]}) > 1:
        return None
    return TokenTypes(tuple(types[:start]), types[start], tuple(types[end:]))


def _prompt(model: SentenceTransformer, side: Side) -> str:
    """Return the model's prompt; "" if the pooling excludes it, which `Towers` refuses unless it is cleared."""
    return prompt_of(model, side) if pools_prompts(model) else ""


def _reference_tokens(model: SentenceTransformer, transformer: Any, side: Side) -> dict[str, np.ndarray]:
    """Map each text with its prompt to the token ids that sentence-transformers passes to the encoder, unmasked."""
    texts = list(TEXTS)
    lengths = (transformer.max_seq_length, *(text_tokenizer(transformer, each).max_length for each in SIDES))
    if (longest := max(length or MAX_CHECKED_LENGTH for length in lengths)) < MAX_CHECKED_LENGTH:
        texts.append("a b " * (longest // 2 + 8))
    prompt, tokens = _prompt(model, side), {}
    for text in texts:
        features = model.preprocess([text], prompt=prompt, task=side)
        ids = features["input_ids"][0]
        if (mask := features.get("attention_mask")) is not None:
            ids = ids[mask[0].bool()]
        tokens[prompt + text] = ids.numpy()
    return tokens


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether normalized embeddings differ by more than `TOLERANCE`. Embeddings that are not finite always differ."""
    first, second = (torch.nn.functional.normalize(x.double(), dim=1) for x in (first, second))
    return not bool((first - second).abs().max() <= TOLERANCE)
