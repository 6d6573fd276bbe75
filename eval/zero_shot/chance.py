"""Chance levels: exact expectations of the measures under a random ranking."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def chance_average_precision(positives: int, items: int) -> float:
    """Expected average precision of a random order of N = `items` with P = `positives`; 0 without a positive.

    The item at rank r is positive with probability P/N; then (r - 1)(P - 1)/(N - 1) positives are expected before it.
    """
    if positives == 0:
        return 0.0
    if items == 1:
        return 1.0
    share = (positives - 1) / (items - 1)
    harmonic = float((1 / np.arange(1, items + 1)).sum())
    return share + (1 - share) * harmonic / items


def chance_recall(positives: Mapping[int, int], items: int, k: int) -> float:
    """Expected recall@k of a random order: the share of queries with at least one positive in the top `k`.

    Args:
        positives: number of positives -> number of queries with that many.
        items: number N of ranked items.
        k: the cut-off.
    """
    queries = sum(positives.values())
    return sum(count * (1 - _miss_probability(own, items, k)) for own, count in positives.items()) / queries


def chance_median_rank(positives: Mapping[int, int], items: int) -> int:
    """Median rank of the first positive in a random order: the smallest k with expected recall@k of at least 1/2."""
    low, high = 1, items
    while low < high:
        middle = (low + high) // 2
        if chance_recall(positives, items, middle) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return low


def _miss_probability(positives: int, items: int, k: int) -> float:
    """Probability that the top k of a random order of N contain none of P positives: C(N - P, k) / C(N, k)."""
    if k + positives > items:
        return 0.0
    drawn = np.arange(positives)
    return float(np.prod((items - k - drawn) / (items - drawn)))
