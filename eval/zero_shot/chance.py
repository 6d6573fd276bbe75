"""What a ranking without any knowledge is expected to score."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def chance_average_precision(positives: int, items: int) -> float:
    """The expected average precision of `positives` among `items` in random order; 0 without a positive.

    An item at place r is relevant with probability P/N, and (r - 1)(P - 1)/(N - 1) relevant ones stand before it.
    """
    if positives == 0:
        return 0.0
    if items == 1:
        return 1.0
    share = (positives - 1) / (items - 1)
    harmonic = float((1 / np.arange(1, items + 1)).sum())
    return share + (1 - share) * harmonic / items


def chance_recall(positives: Mapping[int, int], items: int, k: int) -> float:
    """The expected share of queries with any of their positives within the first `k` places of a random order.

    Args:
        positives: number of positives -> how many queries have so many.
        items: N, all that are ranked.
        k: places that count.
    """
    queries = sum(positives.values())
    return sum(count * (1 - _none_within(own, items, k)) for own, count in positives.items()) / queries


def chance_median_rank(positives: Mapping[int, int], items: int) -> int:
    """The median place of the first positive in random orders: the first k whose chance recall is one half."""
    low, high = 1, items
    while low < high:
        middle = (low + high) // 2
        if chance_recall(positives, items, middle) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return low


def _none_within(positives: int, items: int, k: int) -> float:
    """The probability that the first k of N in random order hold none of P: C(N - P, k) / C(N, k)."""
    if k + positives > items:
        return 0.0
    places = np.arange(positives)
    return float(np.prod((items - k - places) / (items - places)))
