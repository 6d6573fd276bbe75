"""Token ids equal those of the tokenizer's own call."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retriever.models.tokenizer import TextTokenizer

TEXTS = ["a", "", "two words", "[SEP] and [MASK] in a text", "naïve Ünïcode 漢字 🙂", "long " * 60]


@pytest.mark.parametrize("max_length", [None, 16, 5])
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_token_ids_equal_those_of_the_tokenizers_call(
    minilm: str, max_length: int | None, split_special_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.split_special_tokens = split_special_tokens
    expected = tokenizer(TEXTS, truncation=max_length is not None, max_length=max_length)["input_ids"]
    # The truncation and padding of an earlier call must not matter.
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    # The fast path is used.
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    found = TextTokenizer(tokenizer, max_length)(TEXTS)
    assert [found.ids[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_cut_before_they_are_tokenized(minilm: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm, truncation_side=side)
    short, middle = "a few words, ", " " * 2**14
    texts = [short * 5000, middle + short * 900 + middle, "x" * 50_000, short, (middle + "word") * 5]
    expected = tokenizer(texts, truncation=True, max_length=32)["input_ids"]
    read = []
    real = TextTokenizer._ids
    monkeypatch.setattr(TextTokenizer, "_ids", lambda self, texts: read.extend(map(len, texts)) or real(self, texts))
    found = TextTokenizer(tokenizer, 32)(texts)
    assert [found.ids[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == expected
    assert read[0] == 2**13
    read.clear()
    assert len(TextTokenizer(tokenizer, 32)(["x" * 10**7]).ids) == 3
    assert read == [2**13, 2**20]


def test_an_overridden_tokenizer_method_is_used(minilm: str) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            encoded = super()._encode_plus(*args, **options)
            return {**encoded, "input_ids": [[*ids, 7] for ids in encoded["input_ids"]]}

    plain = AutoTokenizer.from_pretrained(minilm)
    own = Own(tokenizer_object=plain.backend_tokenizer, pad_token="[PAD]")
    found = TextTokenizer(own, None)(TEXTS)
    assert found.ids[found.offsets[1:] - 1].tolist() == [7] * len(TEXTS)


def test_threads_can_share_a_tokenizer(minilm: str) -> None:
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(minilm), 16)
    expected = tokenizer(TEXTS * 50).ids.tolist()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: tokenizer(TEXTS * 50).ids.tolist(), range(64)):
            assert found == expected


# A data worker whose parent process has tokenized before.
FORKED = """
import sys
from transformers import AutoTokenizer
from retriever.data.batches import batch_loader
from retriever.models.tokenizer import TextTokenizer

tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), 32)

class Batches:
    def __len__(self):
        return 2

    def __getitem__(self, step):
        return len(tokenizer(["some words"] * 200).ids)

print(Batches()[0], list(batch_loader(Batches(), workers=1)))
"""


def test_workers_can_tokenize_after_their_parent(minilm: str) -> None:
    # With this variable, tokenizers does not disable its parallelism after a fork.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", FORKED, minilm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["800", "[800,", "800]"], done.stderr
