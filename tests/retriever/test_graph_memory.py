"""Micro-batches fit the memory that there is for graphs, and leave little of it unused."""

from __future__ import annotations

import pytest

from retriever.graph_memory import LEAST_TOKENS, MOST_TOKENS, fitting_tokens


@pytest.mark.parametrize("most", [10_000, 40_000, 150_000, 300_000, 423_000, 1_000_000])
def test_whole_micro_batches_fill_the_memory(most: int) -> None:
    tokens = fitting_tokens(most)
    assert LEAST_TOKENS <= tokens <= MOST_TOKENS
    kept = int(most / tokens - 0.25)
    assert kept >= 1 and (kept + 0.25) * tokens <= most
    # Of what is planned for, less than the rounding to whole thousands of each is left over.
    assert most - (kept + 0.25) * tokens <= (kept + 1) * 1024
