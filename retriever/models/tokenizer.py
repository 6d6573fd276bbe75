"""Tokenization, padding and packing of texts. Tokenizers hold no weights, so worker processes can load them alone."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from index.files import InputError

CHARACTERS_PER_TOKEN = 64
"""Characters per token of `max_length` that are tokenized first. Texts have two to five."""
MIN_CHARACTERS = 2**13
MAX_CHARACTERS = 2**20
"""Characters of a text beyond which a truncating tokenizer does not read: tokenizing 10 million takes 15 seconds and
2.3 GB."""

# Truncation settings for single texts.
_TRUNCATION: dict[str, Any] = {"stride": 0, "strategy": "longest_first"}


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts, concatenated. Text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray
    """int32 [tokens]."""
    offsets: np.ndarray
    """int64 [texts + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def concatenate(cls, parts: Sequence[TokenizedTexts]) -> TokenizedTexts:
        """Concatenate at least one part. A single part is returned without a copy."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum()
        return cls(np.concatenate([part.ids for part in parts]), offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, int64 [texts]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class QueryExpansion:
    """Query expansion as in ColBERT: texts shorter than `length` tokens are filled up with the token `token_id`."""

    token_id: int
    length: int


@dataclass(frozen=True)
class TokenTypes:
    """Token type ids that a tokenizer assigns to the tokens of a single text."""

    before: tuple[int, ...]
    """Types of the special tokens before the text."""
    text: int
    """Type of the tokens of the text."""
    after: tuple[int, ...]
    """Types of the special tokens after the text."""

    def ids(self, mask: np.ndarray) -> Tensor:
        """Return `token_type_ids`, int64 [rows, longest], for the attention mask (bool, right-padded) of some texts."""
        lengths = mask.sum(1)
        types = np.full(mask.shape, self.text, dtype=np.int64)
        for position, token_type in enumerate(self.before):
            types[:, position] = token_type
        for position, token_type in enumerate(reversed(self.after), start=1):
            types[np.arange(len(mask)), np.maximum(lengths - position, 0)] = token_type
        return torch.from_numpy(np.where(mask, types, 0))


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a tower, with its truncation and special tokens."""

    tokenizer: Any
    """A tokenizer of transformers with a pad token."""
    max_length: int | None
    """Number of tokens to which texts are truncated, special tokens included. None: no truncation."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens."""
    expansion: QueryExpansion | None = None
    token_types: TokenTypes | None = None
    """Token types that `pad` returns. None if they do not change the embeddings."""

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize texts, with special tokens, truncated to `max_length`. No prompt is added.

        Of a truncated text at most the first MAX_CHARACTERS characters are read.
        """
        rows = self._truncated_ids(list(texts))
        if self.expansion is not None:
            token_id, length = self.expansion.token_id, self.expansion.length
            rows = [row + [token_id] * (length - len(row)) for row in rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return TokenizedTexts(np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1]), offsets)

    def _truncated_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, without tokenizing what truncation would remove from very long ones."""
        if self.max_length is None:
            return list(self._ids(texts))
        first = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * self.max_length)
        long = [row for row, text in enumerate(texts) if len(text) > first]
        if not long:
            return list(self._ids(texts))
        shortened = texts.copy()
        for row in long:
            shortened[row] = self._cut(texts[row], first)
        rows = list(self._ids(shortened))
        # Texts with more characters per token, such as runs of white space.
        if incomplete := [row for row in long if len(rows[row]) < self.max_length]:
            longest = max(first, MAX_CHARACTERS)
            again = self._ids([self._cut(texts[row], longest) for row in incomplete])
            for row, ids in zip(incomplete, again, strict=True):
                rows[row] = ids
        return rows

    def _cut(self, text: str, characters: int) -> str:
        return text[-characters:] if self.tokenizer.truncation_side == "left" else text[:characters]

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        method = getattr(type(self.tokenizer), "_encode_plus", None)
        # The class is recognized by its module's name: an import here can deadlock in a process that was forked while
        # another thread imported.
        if getattr(method, "__module__", None) != "transformers.tokenization_utils_tokenizers":
            return self.tokenizer(
                texts,
                truncation=self.max_length is not None,
                max_length=self.max_length,
                add_special_tokens=self.special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        # Equivalent to the call above, without character offsets, which take as long as the tokens themselves and are
        # partly computed under the GIL.
        backend = self.tokenizer.backend_tokenizer
        truncation = {"max_length": self.max_length, "direction": self.tokenizer.truncation_side, **_TRUNCATION}
        current = backend.truncation or {"max_length": None}
        # Settings are changed only if they differ, because another thread may be tokenizing with the same backend.
        if backend.padding is not None:
            backend.no_padding()
        if self.max_length is None and current["max_length"] is not None:
            backend.no_truncation()
        elif self.max_length is not None and any(current.get(name) != value for name, value in truncation.items()):
            backend.enable_truncation(**truncation)
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=self.special_tokens))

    def untruncated(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize texts without truncation and without query expansion."""
        return replace(self, max_length=None, expansion=None)(texts)

    @property
    def special_count(self) -> int:
        """Number of special tokens that are added to every text."""
        return self.tokenizer.num_special_tokens_to_add() if self.special_tokens else 0

    def check_prompt(self, prompt: str) -> None:
        """Check that a prompt leaves room for the text; otherwise all texts would have the same embedding.

        Raises:
            InputError: If the prompt has `max_length` tokens or more.
        """
        # Truncation on the left removes the prompt first.
        longest = self.max_length if self.tokenizer.truncation_side == "right" else None
        if not prompt or longest is None:
            return
        if (tokens := len(self.untruncated([prompt]).ids)) >= longest:
            raise InputError(f"prompt {prompt!r:.40}: expected fewer than {longest} tokens, found {tokens}")

    def settings(self) -> str:
        """Return all settings that token ids depend on, as JSON. Calls of the tokenizer do not change it."""
        names = ("padding_side", "truncation_side", "pad_token")
        settings: dict[str, Any] = {name: str(getattr(self.tokenizer, name)) for name in names}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            settings["vocabulary"] = self.tokenizer.get_vocab()
        else:
            # The backend stores the truncation and padding of the last call.
            settings["backend"] = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        return json.dumps(settings, sort_keys=True)

    def pack(self, texts: TokenizedTexts, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the token ids of some texts.

        A text without tokens, which occurs if the tokenizer adds no special tokens, is replaced by one pad token.

        Args:
            texts: Tokenized texts.
            rows: int64 [rows], the texts to take.

        Returns:
            Token ids, int32 [tokens], and the lengths of the texts before the replacement, int64 [rows].
        """
        starts, lengths = texts.offsets[rows], texts.lengths[rows]
        positions = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        ids = texts.ids[positions]
        if lengths.all():
            return ids, lengths
        return np.insert(ids, np.cumsum(lengths)[lengths == 0], self.tokenizer.pad_token_id), lengths

    def reset_backend(self) -> None:
        """Remove the truncation and padding that calls leave in the tokenizer, so that saved files do not have them."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()

    def pad(self, texts: TokenizedTexts, rows: np.ndarray) -> dict[str, Tensor]:
        """Pad some texts on the right to the longest of them.

        Args:
            texts: Tokenized texts.
            rows: int64 [rows], the texts to take.

        Returns:
            `input_ids`, `attention_mask` and, if `token_types` is set, `token_type_ids`: int64 [rows, longest] on the
            CPU.
        """
        starts, lengths = texts.offsets[rows], texts.lengths[rows]
        # A text without tokens becomes one masked pad token.
        columns = np.arange(max(1, int(lengths.max())))
        mask = columns < lengths[:, None]
        input_ids = np.full(mask.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        input_ids[mask] = texts.ids[(starts[:, None] + columns)[mask]]
        padded = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.token_types is not None:
            padded["token_type_ids"] = self.token_types.ids(mask)
        return padded


@dataclass(frozen=True)
class FixedLengthTokenizer(TextTokenizer):
    """Tokenizer of towers that attend to padding and expect texts padded to `max_length` (SigLIP)."""

    def pad(self, texts: TokenizedTexts, rows: np.ndarray) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (all ones), int64 [rows, max_length]."""
        ids = super().pad(texts, rows)["input_ids"]
        assert self.max_length is not None
        ids = torch.nn.functional.pad(ids, (0, self.max_length - ids.shape[1]), value=self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def packed_positions(is_padding: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the positions of tokens in packed texts, counted from 1 without padding tokens.

    Args:
        is_padding: bool [tokens], the tokens that are not counted.
        lengths: int64 [texts], with sum `tokens`.

    Returns:
        int64 [tokens]; 0 for padding tokens.
    """
    counted = np.cumsum(~is_padding)
    before = np.concatenate([[0], counted[np.cumsum(lengths)[:-1] - 1]])
    return np.where(is_padding, 0, counted - np.repeat(before, lengths))


@contextlib.contextmanager
def restore_truncation(tokenizers: Iterable[Any]) -> Iterator[None]:
    """Context that restores the truncation and padding of tokenizers on exit."""
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in tokenizers]
    saved = [(backend, backend.truncation, backend.padding) for backend in backends if backend is not None]
    try:
        yield
    finally:
        for backend, truncation, padding in saved:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
