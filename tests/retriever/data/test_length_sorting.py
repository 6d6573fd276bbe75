"""Packing keeps every text once, within the budget, and embeddings find back to their rows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retriever.config.run import ModelConfig
from retriever.data.batches import TrainingBatch
from retriever.data.length_sorting import make_micro_batches
from retriever.data.micro_batches import BatchPreparer
from retriever.models.towers import build_towers


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_every_text_is_in_one_micro_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    batches = make_micro_batches(array, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * array[rows].max() <= budget
    for rows, following in itertools.pairwise(batches):
        longest = array[rows].max()
        assert array[rows].min() >= array[following].max()
        # It ends because the next text would not fit, or is much shorter.
        assert (len(rows) + 1) * longest > budget or array[following].max() < 0.8 * longest


@pytest.mark.parametrize("budget", [1024, 4096, 65536, 10**6])
def test_no_budget_makes_texts_of_all_lengths_share_their_padding(budget: int) -> None:
    chance = np.random.default_rng(0)
    lengths = np.concatenate([np.clip(chance.lognormal(np.log(m), 0.6, 256), 4, 252).astype(int) for m in (8, 62)])
    padded = sum(len(rows) * lengths[rows].max() for rows in make_micro_batches(lengths, budget))
    assert padded < 1.2 * lengths.sum()
    # Where a micro-batch costs more, more padding is worth having fewer, as far as the budget lets them grow.
    fewer = len(make_micro_batches(lengths, budget, device="cuda")) < len(make_micro_batches(lengths, budget))
    assert fewer == (budget > 4096)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_micro_batches_end_to_end_are_full_but_for_the_first(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    batches = make_micro_batches(array, budget, padded=False)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or array[rows].sum() <= budget for rows in batches)
    for rows, following in itertools.pairwise(batches):
        assert array[rows].min() >= array[following].max()
        # It begins where one text more would not fit.
        assert array[following].sum() + array[rows].min() > budget


def batch_of(queries: list[str], positives: list[str], negatives: list[str]) -> TrainingBatch:
    return TrainingBatch(0, queries, positives, negatives, None)


def test_arranged_embeddings_belong_to_their_texts(tiny: ModelConfig) -> None:
    queries = ["a", "a longer query of several words", "b c"]
    positives = ["one two three four five six seven", "p", "p q"]
    negatives = ["n", "hard negative " * 5]
    batch = batch_of(queries, positives, negatives)
    for shared in (True, False):
        towers = build_towers(dataclasses.replace(tiny, shared=shared)).eval()
        prepared = BatchPreparer.of(towers, token_budget=12)(batch)
        assert sum(len(group.micro_batches) for group in prepared.groups) > 3
        embeddings = []
        for group in prepared.groups:
            for rows in group.micro_batches:
                embeddings.append(towers(towers.tokenizer(group.side).pad(group.tokens, rows), group.side))
        query, passage = prepared.arrange(embeddings, torch.device("cpu"))
        for text, row, side in [
            *((t, query[i], "query") for i, t in enumerate(queries)),
            *((t, passage[i], "document") for i, t in enumerate(positives + negatives)),
        ]:
            tokenizer = towers.tokenizer(side)
            alone = towers(tokenizer.pad(tokenizer([text]), np.array([0])), side)[0]
            torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_arranged_embeddings_go_to_where_these_wait(tiny: ModelConfig, shared: bool, device: str) -> None:
    words = [" ".join("abcdefghij"[: 1 + i % 7]) for i in range(31)]
    preparer = BatchPreparer.of(build_towers(dataclasses.replace(tiny, shared=shared)), token_budget=24)
    prepared = preparer(batch_of(words[:11], words[11:22], words[22:]))
    firsts = (0,) if shared else (0, 11)
    cuts = [(first, rows) for first, group in zip(firsts, prepared.groups, strict=True) for rows in group.micro_batches]
    # Of all rows, in order, and as micro-batches of the host.
    whole = torch.randn(31, 5, generator=torch.Generator().manual_seed(0))
    leaves = [whole[first + rows].requires_grad_() for first, rows in cuts]
    weights = torch.randn(31, 5, generator=torch.Generator().manual_seed(1))
    query, passage = prepared.arrange(leaves, torch.device(device))
    assert (query.device.type, len(query), len(passage)) == (device, 11, 20)
    assert torch.equal(torch.cat([query, passage]).cpu(), whole)
    ((query * weights[:11].to(device)).sum() + (passage.square() * weights[11:].to(device)).sum()).backward()
    expected = torch.cat([weights[:11], 2 * whole[11:] * weights[11:]])
    for leaf, (first, rows) in zip(leaves, cuts, strict=True):
        assert leaf.grad is not None and leaf.grad.device == leaf.device
        torch.testing.assert_close(leaf.grad, expected[first + rows])
