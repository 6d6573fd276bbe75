"""A trial when a model is loaded: its embeddings of a few texts are held to those of sentence-transformers.

What differs would differ in a store, an index and a run, so such a model is refused. It finds settings that are not
known here, modules that do not fit each other, and models whose vectors depend on the texts in the same batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index.files import InputError
from retriever.models.loading.text_settings import SIDES, Side, call_settings, pools_prompts, prompt_of, text_tokenizer
from retriever.models.tokenizer import FixedLengthTokenizer, TokenTypes, restore_truncation

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Of unlike lengths, so that all but one are padded; upper case, digits and letters that a normalizer changes.
TEXTS = ("a cat", "How tall is the Eiffel Tower? 330 m, says “Ångström”.")
# Above what the order of sums does to a deep model in fp32.
ALLOWED = 2e-5
# A text of more tokens than the model reads shows how it is cut; not tried for lengths beyond.
LONGEST_TRIAL = 2**16


class Trial:
    """What sentence-transformers makes of a few texts by a model, before anything of the model is changed.

    Args:
        to_train: the model will be saved with its padding on the right; until then, what sentence-transformers makes
            of several texts at once need not be right.

    Raises:
        InputError: it makes nothing of them, or not the same beside other texts.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        transformers: dict[Side, Any],
        path: str,
        faults: tuple[type[Exception], ...],
        *,
        to_train: bool = False,
    ):
        self.path, self.faults, self.to_train = path, faults, to_train
        self.transformers = transformers
        # One shared tower computes alike on both sides; what sides differ in shows in the token ids.
        self.sides: Sequence[Side] = SIDES if hasattr(model[0], "sub_modules") else SIDES[:1]
        try:
            with self._untouched():
                # Each text alone, so that none is padded.
                self.embeddings = {
                    side: torch.cat([_their_embeddings(model, side, [text]) for text in TEXTS]) for side in self.sides
                }
                if not all(bool(of_side.isfinite().all()) for of_side in self.embeddings.values()):
                    raise InputError(f"{path}: its embeddings are not finite")
                if not to_train:
                    self._check_left(model)
        except InputError:
            raise
        except faults as error:
            raise InputError(f"{path}: cannot embed texts: {_one_line(error)}") from error

    def check(self, model: SentenceTransformer) -> None:
        """Raises InputError where the embeddings made here are others."""
        with self._untouched():
            if self.to_train:
                self._check_left(model)
            self._check_tokens(model)
            self._check_embeddings(model)

    def _untouched(self) -> contextlib.AbstractContextManager[None]:
        return restore_truncation(transformer.tokenizer for transformer in self.transformers.values())

    def _check_left(self, model: SentenceTransformer) -> None:
        """Raises InputError where padding on the left shifts positions; on the right it is as ours."""
        for side in self.sides:
            transformer = self.transformers[side]
            sides = transformer.tokenizer.padding_side, call_settings(transformer).get("padding_side")
            if "left" in sides:
                self._check_batch(model, side, "its tokenizer pads on the left")

    def _check_batch(self, model: SentenceTransformer, side: Side, why: str) -> None:
        """Raises InputError where sentence-transformers gives a text another vector beside a longer one."""
        if _differ(_their_embeddings(model, side, list(TEXTS)), self.embeddings[side]):
            raise InputError(f"{self.path}: a text's embedding depends on the texts beside it: {why}")

    def _check_tokens(self, model: SentenceTransformer) -> None:
        """Now rather than before, since lengths have been cut to the positions that there are."""
        for side in SIDES:
            tokenizer = text_tokenizer(self.transformers[side], side)
            if isinstance(tokenizer, FixedLengthTokenizer):
                continue
            of_texts = _their_tokens(model, self.transformers[side], side)
            found = tokenizer(list(of_texts))
            for number, (text, expected) in enumerate(of_texts.items()):
                ids = found.ids[found.offsets[number] : found.offsets[number + 1]]
                if not np.array_equal(ids, expected):
                    raise InputError(
                        f"{self.path}: expected the token ids of sentence-transformers for {text!r:.40} as a {side}, "
                        f"found others; its tokenizer, or a setting of it, is not supported"
                    )

    def _check_embeddings(self, model: SentenceTransformer) -> None:
        for side in self.sides:
            expected = self.embeddings[side]
            found = sample_embeddings(model, self.transformers[side], side, self.path, self.faults)
            if found.shape != expected.shape:
                raise InputError(
                    f"{self.path}: expected embeddings of {expected.shape[1]} dimensions, found {found.shape[1]}"
                )
            if _differ(found, expected) and (types := _token_types(model, self.transformers[side], side)):
                self.transformers[side].token_types = types
                found = sample_embeddings(model, self.transformers[side], side, self.path, self.faults)
            if _differ(found, expected):
                self._check_batch(model, side, "its encoder or a module mixes padding into texts")
                raise InputError(
                    f"{self.path}: expected the embeddings of sentence-transformers, found others; a module of the "
                    f"folder, a setting or what its tokenizer gives beside token ids is not supported"
                )


def sample_embeddings(
    model: SentenceTransformer, transformer: Any, side: Side, path: str, faults: tuple[type[Exception], ...]
) -> Tensor:
    """Our embeddings of the trial's texts as one padded batch; of as many dimensions as the model says.

    Raises:
        InputError: the modules do not fit each other.
    """
    tokenizer, prompt = text_tokenizer(transformer, side), _prompt(model, side)
    with restore_truncation([transformer.tokenizer]):
        features = tokenizer.pad(tokenizer([prompt + text for text in TEXTS]), np.arange(len(TEXTS)))
    width = model.get_embedding_dimension()
    model.eval()
    try:
        with torch.no_grad():
            found = model(dict(features), task=side)["sentence_embedding"]
    except faults as error:
        raise InputError(f"{path}: its modules do not fit each other: {_one_line(error)}") from error
    if found.ndim != 2 or found.shape[1] != width:
        raise InputError(
            f"{path}: expected embeddings of {width} dimensions, as its modules say, found {found.shape[-1]}"
        )
    return found


def _their_embeddings(model: SentenceTransformer, side: Side, texts: list[str]) -> Tensor:
    """As `encode_query` and `encode_document`, without inference mode: what modules keep of a pass is trained on."""
    model.eval()
    with torch.no_grad():
        features = model.preprocess(texts, prompt=_prompt(model, side), task=side)
        return model(features, task=side)["sentence_embedding"][:, : model.truncate_dim]


def _token_types(model: SentenceTransformer, transformer: Any, side: Side) -> TokenTypes | None:
    """The types that the tokenizer gives the tokens of a text; none where it gives none, or several to one text."""
    features = model.preprocess([TEXTS[0]], task=side)
    if "token_type_ids" not in features or isinstance(text_tokenizer(transformer, side), FixedLengthTokenizer):
        return None
    seen = features["attention_mask"][0].bool()
    ids, types = features["input_ids"][0][seen].tolist(), features["token_type_ids"][0][seen].tolist()
    special = transformer.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    inside = [place for place, is_special in enumerate(special) if not is_special]
    first, last = inside[0], inside[-1] + 1
    if len({*types[first:last]}) > 1:
        return None
    return TokenTypes(tuple(types[:first]), types[first], tuple(types[last:]))


def _prompt(model: SentenceTransformer, side: Side) -> str:
    """The model's own; none where it is not pooled, which `Towers` refuses unless it is cleared first."""
    return prompt_of(model, side) if pools_prompts(model) else ""


def _their_tokens(model: SentenceTransformer, transformer: Any, side: Side) -> dict[str, np.ndarray]:
    """Text with prompt -> the token ids that sentence-transformers lets the encoder see."""
    texts = list(TEXTS)
    lengths = (transformer.max_seq_length, *(text_tokenizer(transformer, each).max_length for each in SIDES))
    if (longest := max(length or LONGEST_TRIAL for length in lengths)) < LONGEST_TRIAL:
        texts.append("a b " * (longest // 2 + 8))
    prompt, found = _prompt(model, side), {}
    for text in texts:
        features = model.preprocess([text], prompt=prompt, task=side)
        ids = features["input_ids"][0]
        if (mask := features.get("attention_mask")) is not None:
            ids = ids[mask[0].bool()]
        found[prompt + text] = ids.numpy()
    return found


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether embeddings are not the same but for rounding; of what is not finite, never the same."""
    one, other = (torch.nn.functional.normalize(each.double(), dim=1) for each in (one, other))
    return not bool((one - other).abs().max() <= ALLOWED)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
