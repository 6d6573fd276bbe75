"""Micro-batches: texts of like length together, so that little of what passes through a tower is padding."""

from __future__ import annotations

import itertools

import numpy as np

# A micro-batch ends where its texts get shorter than this part of its longest (10 % padding on average) …
_SHORTEST = 0.8
# … unless it is still below this part of the budget, and below what one micro-batch more costs, in tokens.
_LEAST = 1 / 16
_COST = {"cpu": 256, "cuda": 8192}


def make_micro_batches(
    lengths: np.ndarray, token_budget: int, *, padded: bool = True, device: str = "cpu"
) -> list[np.ndarray]:
    """Divide texts into micro-batches of at most `token_budget` tokens.

    Texts are sorted by length, longest first, and cut greedily; a text longer than the budget makes a micro-batch of
    its own. Padded ones are cut from the longest (the first micro-batch then meets the highest memory, at once), others
    from the shortest: all but the first are full, and the last ones, whose graphs are kept, fill the memory for them.

    Args:
        lengths: int64 [texts], tokens of each text.
        token_budget: most tokens a micro-batch.
        padded: texts are padded to the longest of their micro-batch, and padding counts: a micro-batch then also ends
            where its texts get shorter. If not, texts are laid end to end.
        device: its type, "cpu" or "cuda".

    Returns:
        Row numbers of each micro-batch; every row stands in exactly one.
    """
    # The sort is stable, so the micro-batches of a batch are the same on every machine.
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    least = min(int(_LEAST * token_budget), _COST[device])
    cuts = _cuts_of_padded(falling, token_budget, least) if padded else _cuts_end_to_end(falling, token_budget)
    return [order[start:end] for start, end in itertools.pairwise(cuts)]


def _cuts_of_padded(falling: np.ndarray, token_budget: int, least: int) -> list[int]:
    cuts = [0]
    while (start := cuts[-1]) < len(falling):
        longest = max(1, int(falling[start]))
        like = int(np.searchsorted(-falling, -_SHORTEST * longest, side="right")) - start
        size = min(token_budget // longest, max(like, least // longest))
        cuts.append(start + max(1, size))
    return cuts


def _cuts_end_to_end(falling: np.ndarray, token_budget: int) -> list[int]:
    before = np.concatenate([[0], np.cumsum(falling)])
    cuts = [len(falling)]
    while (end := cuts[-1]) > 0:
        cuts.append(min(end - 1, int(np.searchsorted(before, before[end] - token_budget))))
    return cuts[::-1]
