"""Micro-batches: texts of like length together, so that little of what passes through a tower is padding."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Divide texts into micro-batches of at most `token_budget` tokens, padding included.

    Texts are sorted by length, longest first (the first micro-batch then meets the highest memory, at once), and cut
    greedily; a text longer than the budget makes a micro-batch of its own.

    Args:
        lengths: int64 [texts], tokens of each text.
        token_budget: most tokens a micro-batch: its longest text times its number of texts.

    Returns:
        Row numbers of each micro-batch; every row stands in exactly one.
    """
    # The sort is stable, so the micro-batches of a batch are the same on every machine.
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
