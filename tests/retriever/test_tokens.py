"""Token ids are those that the tokenizer's own call gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retriever.tokens import TextTokenizer

TEXTS = ["a", "", "two words", "[SEP] and [MASK] in a text", "naïve Ünïcode 漢字 🙂", "long " * 60]


@pytest.mark.parametrize("max_length", [None, 16, 5])
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_are_those_of_the_tokenizers_call(
    minilm: str, max_length: int | None, split_special_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.split_special_tokens = split_special_tokens
    expected = tokenizer(TEXTS, truncation=max_length is not None, max_length=max_length)["input_ids"]
    # Whatever a call left in the tokenizer.
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    # The short way is the one that is taken.
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    found = TextTokenizer(tokenizer, max_length)(TEXTS)
    assert [found.ids[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == expected


def test_a_tokenizer_with_its_own_way_keeps_it(minilm: str) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            encoded = super()._encode_plus(*args, **options)
            return {**encoded, "input_ids": [[*ids, 7] for ids in encoded["input_ids"]]}

    plain = AutoTokenizer.from_pretrained(minilm)
    own = Own(tokenizer_object=plain.backend_tokenizer, pad_token="[PAD]")
    found = TextTokenizer(own, None)(TEXTS)
    assert found.ids[found.offsets[1:] - 1].tolist() == [7] * len(TEXTS)


def test_threads_tokenize_at_once(minilm: str) -> None:
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(minilm), 16)
    expected = tokenizer(TEXTS * 50).ids.tolist()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: tokenizer(TEXTS * 50).ids.tolist(), range(64)):
            assert found == expected
