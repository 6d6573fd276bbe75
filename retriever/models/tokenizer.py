"""Texts as token ids: tokenization and padding, apart from the weights so that worker processes carry only these."""

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

# How a single text is cut, whatever a caller's truncation of pairs was.
_WHOLE_TEXTS: dict[str, Any] = {"stride": 0, "strategy": "longest_first"}


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts, end to end: text i is `ids[offsets[i]:offsets[i + 1]]`. int32 ids, int64 offsets."""

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def joined(cls, parts: Sequence[TokenizedTexts]) -> TokenizedTexts:
        """The texts of one part after those of another; of one part itself, nothing is copied."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum()
        return cls(np.concatenate([part.ids for part in parts]), offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a text, int64 [texts]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class QueryExpansion:
    """Query expansion as in ColBERT: short texts are filled up to `length` tokens with the token `token_id`."""

    token_id: int
    length: int


@dataclass(frozen=True)
class TokenTypes:
    """The token types that a tokenizer gives a text: of the special tokens before it, of itself, and of those after."""

    before: tuple[int, ...]
    text: int
    after: tuple[int, ...]

    def of(self, mask: np.ndarray) -> Tensor:
        """int64 [rows, longest] for texts whose tokens are those of the mask, padded on the right."""
        lengths = mask.sum(1)
        types = np.full(mask.shape, self.text, dtype=np.int64)
        for place, of_token in enumerate(self.before):
            types[:, place] = of_token
        for place, of_token in enumerate(reversed(self.after), start=1):
            types[np.arange(len(mask)), np.maximum(lengths - place, 0)] = of_token
        return torch.from_numpy(np.where(mask, types, 0))


@dataclass(frozen=True)
class TextTokenizer:
    """A tower's tokenizer, which has a pad token, and how texts are cut and marked."""

    tokenizer: Any
    max_length: int | None
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens."""
    expansion: QueryExpansion | None = None
    token_types: TokenTypes | None = None
    """What the encoder is given; none where it makes no difference."""

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of each text, special tokens included, cut to the longest length. No prompt is added."""
        rows = list(self._ids(list(texts)))
        if self.expansion is not None:
            token_id, length = self.expansion.token_id, self.expansion.length
            rows = [row + [token_id] * (length - len(row)) for row in rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return TokenizedTexts(np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1]), offsets)

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        way = getattr(type(self.tokenizer), "_encode_plus", None)
        # By its name: an import here may wait for ever in a process that was forked while another thread imported.
        if getattr(way, "__module__", None) != "transformers.tokenization_utils_tokenizers":
            return self.tokenizer(
                texts,
                truncation=self.max_length is not None,
                max_length=self.max_length,
                add_special_tokens=self.special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        # What the call above comes to, without the offsets of tokens in texts, which take as long as the tokens and a
        # quarter of it under Python's lock.
        backend = self.tokenizer.backend_tokenizer
        wanted = {"max_length": self.max_length, "direction": self.tokenizer.truncation_side, **_WHOLE_TEXTS}
        held = backend.truncation or {"max_length": None}
        # Only what differs is set: another thread's texts may be under way, and would be cut otherwise.
        if backend.padding is not None:
            backend.no_padding()
        if self.max_length is None and held["max_length"] is not None:
            backend.no_truncation()
        elif self.max_length is not None and any(held.get(name) != value for name, value in wanted.items()):
            backend.enable_truncation(**wanted)
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=self.special_tokens))

    def whole(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of each text, neither cut nor filled up."""
        return replace(self, max_length=None, expansion=None)(texts)

    @property
    def special_count(self) -> int:
        """Special tokens that every text gets."""
        return self.tokenizer.num_special_tokens_to_add() if self.special_tokens else 0

    def check_prompt(self, prompt: str) -> None:
        """A prompt that fills all that is read of a text would give every text the same embedding.

        Raises:
            InputError: it does.
        """
        # Cut on the left, a text loses its prompt first.
        longest = self.max_length if self.tokenizer.truncation_side == "right" else None
        if not prompt or longest is None:
            return
        if (taken := len(self.whole([prompt]).ids)) >= longest:
            raise InputError(
                f"prompt {prompt!r:.40}: expected one that leaves some of {longest} tokens for the text, found {taken}"
            )

    def settings(self) -> str:
        """All that the token ids of a text depend on, as text; the same before and after use."""
        names = ("padding_side", "truncation_side", "pad_token")
        settings: dict[str, Any] = {name: str(getattr(self.tokenizer, name)) for name in names}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            settings["vocabulary"] = self.tokenizer.get_vocab()
        else:
            # Without the last call's truncation and padding, which are no setting of the tokenizer.
            settings["backend"] = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        return json.dumps(settings, sort_keys=True)

    def pack(self, texts: TokenizedTexts, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [tokens] of some texts, one after another, and their lengths int64 [rows].

        In the place of an empty text, of a tokenizer without special tokens, stands one pad token.
        """
        starts, lengths = texts.offsets[rows], texts.lengths[rows]
        places = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        ids = texts.ids[places]
        if lengths.all():
            return ids, lengths
        return np.insert(ids, np.cumsum(lengths)[lengths == 0], self.tokenizer.pad_token_id), lengths

    def reset_backend(self) -> None:
        """Take back what calls leave in the tokenizer; what is saved of it then does not depend on them."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()

    def pad(self, texts: TokenizedTexts, rows: np.ndarray) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 [rows, longest], padded on the right; on the CPU.

        And `token_type_ids`, where they make a difference.
        """
        starts, lengths = texts.offsets[rows], texts.lengths[rows]
        # A tokenizer without special tokens makes nothing of an empty text; it becomes one masked pad token.
        columns = np.arange(max(1, int(lengths.max())))
        mask = columns < lengths[:, None]
        input_ids = np.full(mask.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        input_ids[mask] = texts.ids[(starts[:, None] + columns)[mask]]
        padded = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.token_types is not None:
            padded["token_type_ids"] = self.token_types.of(mask)
        return padded


@dataclass(frozen=True)
class FixedLengthTokenizer(TextTokenizer):
    """For towers that were trained on texts padded to their longest length and read the padding like text (SigLIP)."""

    def pad(self, texts: TokenizedTexts, rows: np.ndarray) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (all ones), int64 [rows, max_length]."""
        ids = super().pad(texts, rows)["input_ids"]
        assert self.max_length is not None
        ids = torch.nn.functional.pad(ids, (0, self.max_length - ids.shape[1]), value=self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def packed_positions(passed_over: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Places of tokens in their texts, counted from 1 and laid end to end; 0 for those that are not counted.

    Args:
        passed_over: bool [tokens].
        lengths: int64 [texts], which sum to the number of tokens.
    """
    counted = np.cumsum(~passed_over)
    before = np.concatenate([[0], counted[np.cumsum(lengths)[:-1] - 1]])
    return np.where(passed_over, 0, counted - np.repeat(before, lengths))


@contextlib.contextmanager
def restore_truncation(tokenizers: Iterable[Any]) -> Iterator[None]:
    """Take back afterwards what calls within leave in tokenizers: how texts were cut and padded last."""
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in tokenizers]
    held = [(backend, backend.truncation, backend.padding) for backend in backends if backend is not None]
    try:
        yield
    finally:
        for backend, truncation, padding in held:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
