"""Texts of a stated length in tokens, for speed benchmarks: real words (WordNet's), in an order that means nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from index.passages import read_passages
from scripts import DATA

CORPUS = DATA / "wordnet" / "corpus.jsonl.gz"

QUERY, PASSAGE = "query", "passage"
# Log-normal: median and spread of the logarithm, shortest and longest, in tokens with the two special ones.
# Means 9.5 and 73: questions and passages of web search.
LENGTHS = {QUERY: (8.6, 0.45, 4, 252), PASSAGE: (62.0, 0.6, 4, 252)}


class SizedTexts:
    """Texts of the two kinds, as many as are asked for; the same for the same seed."""

    def __init__(self, tokenizer: Any, seed: int = 0):
        text = " ".join(passage.content for passage in read_passages(CORPUS))
        self._words = np.array(text.split(), dtype=object)
        unique, place = np.unique(self._words.astype(str), return_inverse=True)
        tokens = [len(ids) for ids in tokenizer(unique.tolist(), add_special_tokens=False)["input_ids"]]
        self._tokens = np.concatenate([[0], np.cumsum(np.array(tokens)[place])])
        self._chance = np.random.default_rng(seed)

    def make(self, kind: str, count: int) -> Iterator[str]:
        """`count` texts of a kind, one after another."""
        median, spread, shortest, longest = LENGTHS[kind]
        lengths = np.clip(self._chance.lognormal(np.log(median), spread, count), shortest, longest).astype(int) - 2
        starts = self._chance.integers(0, len(self._words) - longest, count)
        ends = np.searchsorted(self._tokens, self._tokens[starts] + lengths, side="right") - 1
        for start, end in zip(starts.tolist(), np.maximum(ends, starts + 1).tolist(), strict=True):
            yield " ".join(self._words[start:end])

    def write_pairs(self, path: Path, count: int) -> None:
        """A JSON-lines file of `count` queries with their positives."""
        with path.open("w", encoding="utf-8") as stream:
            for query, passage in zip(self.make(QUERY, count), self.make(PASSAGE, count), strict=True):
                stream.write(json.dumps({"query": query, "positive": passage}) + "\n")
