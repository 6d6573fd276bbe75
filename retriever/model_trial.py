"""A trial when a model is loaded: its embeddings of a few texts are held to those of sentence-transformers.

What differs would differ in a store, an index and a run, so such a model is refused. It finds settings that are not
known here, modules that do not fit each other, and models whose vectors depend on the texts in the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from index.files import InputError
from retriever.text_settings import SIDES, Side, prompt_of, text_tokenizer
from retriever.tokens import FixedLengthTokenizer, untouched

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Of unlike lengths, so that all but one are padded; upper case, digits and letters that a normalizer changes.
TEXTS = ("a", "How tall is the Eiffel Tower? 330 m, says “Ångström”.")
# Above what the order of sums does to a deep model in fp32.
ALLOWED = 2e-4
# A text of more tokens than the model reads shows how it is cut; not tried for lengths beyond.
LONGEST_TRIAL = 2**16


class Trial:
    """What sentence-transformers makes of a few texts by a model, before anything of the model is changed.

    Raises:
        InputError: it makes nothing of them.
    """

    def __init__(self, model: SentenceTransformer, transformers: dict[Side, Any], path: str, faults: Any):
        self.path, self.faults = path, faults
        self.transformers = transformers
        # One shared tower computes alike on both sides; what sides differ in shows in the token ids.
        self.sides: Sequence[Side] = SIDES if len(set(transformers.values())) > 1 else SIDES[:1]
        try:
            with untouched(transformer.tokenizer for transformer in transformers.values()):
                self.embeddings = {side: _their_embeddings(model, side) for side in self.sides}
        except faults as error:
            raise InputError(f"{path}: cannot embed texts: {_one_line(error)}") from error

    def check(self, model: SentenceTransformer) -> None:
        """Raises InputError where the embeddings made here are others."""
        with untouched(transformer.tokenizer for transformer in self.transformers.values()):
            self._check_tokens(model)
            self._check_embeddings(model)

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
            found = trial_embeddings(model, self.transformers[side], side, self.path, self.faults)
            if found.shape != expected.shape:
                raise InputError(
                    f"{self.path}: expected embeddings of {expected.shape[1]} dimensions, found {found.shape[1]}"
                )
            if not bool((_directions(found) - _directions(expected)).abs().max() <= ALLOWED):
                raise InputError(
                    f"{self.path}: expected the embeddings that sentence-transformers gives each text alone, found "
                    f"others; a module that lets padding or other texts into a text is not supported"
                )


def trial_embeddings(model: SentenceTransformer, transformer: Any, side: Side, path: str, faults: Any) -> Tensor:
    """Our embeddings of the trial's texts as one padded batch; of as many dimensions as the model says.

    Raises:
        InputError: the modules do not fit each other.
    """
    tokenizer, prompt = text_tokenizer(transformer, side), prompt_of(model, side)
    features = tokenizer.pad(tokenizer([prompt + text for text in TEXTS]), np.arange(len(TEXTS)))
    width = model.get_embedding_dimension()
    model.eval()
    try:
        with torch.no_grad():
            found = model(dict(features), task=side)["sentence_embedding"]
    except faults as error:
        raise InputError(f"{path}: its modules do not fit each other: {_one_line(error)}") from error
    if found.ndim != 2 or found.shape[1] != width:
        raise InputError(f"{path}: expected embeddings of {width} dimensions, as its modules say, found {found.shape}")
    return found


def _their_embeddings(model: SentenceTransformer, side: Side) -> Tensor:
    """Each text alone, so that none is padded."""
    encode: Any = model.encode_query if side == "query" else model.encode_document
    return torch.cat([encode([text], show_progress_bar=False, convert_to_tensor=True) for text in TEXTS])


def _their_tokens(model: SentenceTransformer, transformer: Any, side: Side) -> dict[str, np.ndarray]:
    """Text with prompt -> the token ids that sentence-transformers lets the encoder see."""
    texts = list(TEXTS)
    lengths = (transformer.max_seq_length, *(text_tokenizer(transformer, each).max_length for each in SIDES))
    if (longest := max(length or LONGEST_TRIAL for length in lengths)) < LONGEST_TRIAL:
        texts.append("a b " * (longest // 2 + 8))
    prompt, found = prompt_of(model, side), {}
    for text in texts:
        features = model.preprocess([text], prompt=prompt, task=side)
        ids = features["input_ids"][0]
        if (mask := features.get("attention_mask")) is not None:
            ids = ids[mask[0].bool()]
        found[prompt + text] = ids.numpy()
    return found


def _directions(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.double(), dim=1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
