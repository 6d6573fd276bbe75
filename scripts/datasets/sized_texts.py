"""Texts of given lengths in tokens for throughput benchmarks: runs of real words (WordNet's), not sentences."""

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
# Log-normal lengths in tokens, with two special tokens: median, standard deviation of the logarithm, minimum, maximum.
# The means are 9.5 and 73, as of questions and passages in web search.
LENGTHS = {QUERY: (8.6, 0.45, 4, 252), PASSAGE: (62.0, 0.6, 4, 252)}


class SizedTexts:
    """Generates texts of two kinds. Equal seeds give equal texts."""

    def __init__(self, tokenizer: Any, seed: int = 0):
        text = " ".join(passage.content for passage in read_passages(CORPUS))
        self._words = np.array(text.split(), dtype=object)
        unique, inverse = np.unique(self._words.astype(str), return_inverse=True)
        tokens = [len(ids) for ids in tokenizer(unique.tolist(), add_special_tokens=False)["input_ids"]]
        self._tokens = np.concatenate([[0], np.cumsum(np.array(tokens)[inverse])])
        self._rng = np.random.default_rng(seed)

    def make(self, kind: str, count: int) -> Iterator[str]:
        """Generate `count` texts of a kind."""
        median, spread, shortest, longest = LENGTHS[kind]
        lengths = np.clip(self._rng.lognormal(np.log(median), spread, count), shortest, longest).astype(int) - 2
        starts = self._rng.integers(0, len(self._words) - longest, count)
        ends = np.searchsorted(self._tokens, self._tokens[starts] + lengths, side="right") - 1
        for start, end in zip(starts.tolist(), np.maximum(ends, starts + 1).tolist(), strict=True):
            yield " ".join(self._words[start:end])

    def write_pairs(self, path: Path, count: int) -> None:
        """Write a JSON lines file of `count` queries with positives."""
        with path.open("w", encoding="utf-8") as stream:
            for query, passage in zip(self.make(QUERY, count), self.make(PASSAGE, count), strict=True):
                stream.write(json.dumps({"query": query, "positive": passage}) + "\n")
