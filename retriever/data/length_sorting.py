"""Micro-batches of texts of similar length, so that little of a micro-batch is padding."""

from __future__ import annotations

import itertools

import numpy as np

# A micro-batch ends where texts are shorter than this fraction of its longest text (10 % padding on average),
_MIN_LENGTH_RATIO = 0.8
# unless it has fewer tokens than this fraction of the budget and than the overhead of one more micro-batch.
_MIN_FILL = 1 / 16
_OVERHEAD_TOKENS = {"cpu": 256, "cuda": 8192}


def make_micro_batches(
    lengths: np.ndarray, token_budget: int, *, padded: bool = True, device: str = "cpu"
) -> list[np.ndarray]:
    """Split texts into micro-batches of at most `token_budget` tokens.

    Texts are sorted by length, longest first, and split greedily. A text longer than the budget is a micro-batch by
    itself.

    Padded micro-batches are filled from the longest text, so that the first one reaches the peak of memory. Packed
    micro-batches are filled from the shortest text, so that all but the first are full; the last ones are those whose
    graphs are kept.

    Args:
        lengths: int64 [texts], number of tokens of each text.
        token_budget: Largest number of tokens in a micro-batch.
        padded: Whether texts are padded to the longest of their micro-batch. Padding counts as tokens, and a
            micro-batch also ends where texts become much shorter. If False, texts are packed. Default: True.
        device: Device type, "cpu" or "cuda". Default: "cpu".

    Returns:
        Row numbers, int64, of each micro-batch. Every row is in exactly one.
    """
    # A stable sort, so that the micro-batches are the same on every machine.
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    min_tokens = min(int(_MIN_FILL * token_budget), _OVERHEAD_TOKENS[device])
    bounds = (
        _padded_bounds(descending, token_budget, min_tokens) if padded else _packed_bounds(descending, token_budget)
    )
    return [order[start:end] for start, end in itertools.pairwise(bounds)]


def _padded_bounds(descending: np.ndarray, token_budget: int, min_tokens: int) -> list[int]:
    bounds = [0]
    while (start := bounds[-1]) < len(descending):
        longest = max(1, int(descending[start]))
        similar = int(np.searchsorted(-descending, -_MIN_LENGTH_RATIO * longest, side="right")) - start
        size = min(token_budget // longest, max(similar, min_tokens // longest))
        bounds.append(start + max(1, size))
    return bounds


def _packed_bounds(descending: np.ndarray, token_budget: int) -> list[int]:
    tokens_before = np.concatenate([[0], np.cumsum(descending)])
    bounds = [len(descending)]
    while (end := bounds[-1]) > 0:
        bounds.append(min(end - 1, int(np.searchsorted(tokens_before, tokens_before[end] - token_budget))))
    return bounds[::-1]
