"""Which passages of a row are used in a step: its positives and hard negatives, drawn at random if it has more."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from retriever.data.false_negatives import Integers
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.sources import Example


@dataclass(frozen=True)
class PassageSettings:
    """How many passages of a row are used, and which queries see its hard negatives.

    Raises:
        ValueError: If a number is out of range.
    """

    positives: Literal["draw", "all"] = "draw"
    """draw: one positive per query. all: up to `max_positives`."""
    max_positives: int = 8
    """Largest number of positives per query."""
    negatives: int = 0
    """Largest number of hard negatives per query."""
    negatives_seen_by: Literal["all", "own"] = "all"
    """Whether hard negatives are negatives of all queries or only of their own."""

    def __post_init__(self) -> None:
        if self.negatives < 0:
            raise ValueError(f"negatives: expected 0 or more, found {self.negatives}")
        if self.max_positives < 1:
            raise ValueError(f"max_positives: expected at least 1, found {self.max_positives}")


@dataclass(frozen=True)
class Choice:
    """Indices of the passages of one row."""

    positive: int
    """The positive that is row i of the passages for query i."""
    further: list[int]
    """Further positives."""
    negatives: list[int]


def choose_passages(example: Example, settings: PassageSettings, draw: float, seed: int) -> Choice:
    """Choose passages of a row.

    Args:
        example: The row.
        settings: How many are used.
        draw: Number in [0, 1) that determines the positive.
        seed: Seed of the other choices.
    """
    positive = int(draw * len(example.positives))
    generator = random.Random(seed)
    count = min(settings.negatives, len(example.negatives))
    negatives = generator.sample(range(len(example.negatives)), count)
    further: list[int] = []
    if settings.positives == "all":
        others = [i for i in range(len(example.positives)) if i != positive]
        further = sorted(generator.sample(others, min(settings.max_positives - 1, len(others))))
    return Choice(positive, further, negatives)


def without_known_positives(
    queries: Sequence[str], negatives: Sequence[Sequence[str]], known: KnownPositives | None
) -> list[list[int]]:
    """Return for each query the indices of its negatives that no row pairs with its text as a positive.

    Args:
        queries: [M] texts without prompts.
        negatives: The hard negatives of each query.
        known: Positives of the queries with several positives. None: every negative is kept.
    """
    if known is None:
        return [list(range(len(texts))) for texts in negatives]
    query_keys, keys = text_digests(queries), text_digests(text for texts in negatives for text in texts)
    pairs = set(map(tuple, known.pairs(query_keys, keys).tolist()))
    ends = np.cumsum([len(texts) for texts in negatives])
    of_queries = np.split(keys, ends[:-1])
    return [
        [i for i, key in enumerate(own.tolist()) if (query, key) not in pairs]
        for query, own in zip(query_keys.tolist(), of_queries, strict=True)
    ]


def offsets_of(counts: Sequence[int]) -> Integers:
    """Return 0 and the cumulative sums of counts, int64 [len(counts) + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
