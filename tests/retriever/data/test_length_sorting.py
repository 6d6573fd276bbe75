"""Micro-batches have every text once, within the budget, and embeddings are merged in the order of the batch."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retriever.config.model import ModelConfig
from retriever.data.batches import TrainingBatch
from retriever.data.length_sorting import make_micro_batches
from retriever.data.micro_batches import BatchPreparer
from retriever.models.modality import build_towers


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
        # It ends because the next text does not fit, or is much shorter.
        assert (len(rows) + 1) * longest > budget or array[following].max() < 0.8 * longest


@pytest.mark.parametrize("budget", [1024, 4096, 65536, 10**6])
def test_padding_is_limited_for_any_budget(budget: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.concatenate([np.clip(generator.lognormal(np.log(m), 0.6, 256), 4, 252).astype(int) for m in (8, 62)])
    padded = sum(len(rows) * lengths[rows].max() for rows in make_micro_batches(lengths, budget))
    assert padded < 1.2 * lengths.sum()
    # On a GPU a micro-batch has more overhead, so there are fewer, if the budget allows larger ones.
    fewer = len(make_micro_batches(lengths, budget, device="cuda")) < len(make_micro_batches(lengths, budget))
    assert fewer == (budget > 4096)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_packed_micro_batches_are_full_except_the_first(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    batches = make_micro_batches(array, budget, padded=False)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or array[rows].sum() <= budget for rows in batches)
    for rows, following in itertools.pairwise(batches):
        assert array[rows].min() >= array[following].max()
        # One more text would not fit.
        assert array[following].sum() + array[rows].min() > budget


def batch_of(queries: list[str], positives: list[str], negatives: list[str]) -> TrainingBatch:
    return TrainingBatch(0, queries, positives, negatives, None)


def test_merged_embeddings_are_in_the_order_of_the_batch(tiny: ModelConfig) -> None:
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
        query, passage = prepared.merge_embeddings(embeddings, torch.device("cpu"))
        for text, row, side in [
            *((t, query[i], "query") for i, t in enumerate(queries)),
            *((t, passage[i], "document") for i, t in enumerate(positives + negatives)),
        ]:
            tokenizer = towers.tokenizer(side)
            alone = towers(tokenizer.pad(tokenizer([text]), np.array([0])), side)[0]
            torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_on_the_device_of_the_embeddings(tiny: ModelConfig, shared: bool, device: str) -> None:
    words = [" ".join("abcdefghij"[: 1 + i % 7]) for i in range(31)]
    preparer = BatchPreparer.of(build_towers(dataclasses.replace(tiny, shared=shared)), token_budget=24)
    prepared = preparer(batch_of(words[:11], words[11:22], words[22:]))
    firsts = (0,) if shared else (0, 11)
    cuts = [(first, rows) for first, group in zip(firsts, prepared.groups, strict=True) for rows in group.micro_batches]
    # All rows in order, and as micro-batches on the host.
    whole = torch.randn(31, 5, generator=torch.Generator().manual_seed(0))
    leaves = [whole[first + rows].requires_grad_() for first, rows in cuts]
    weights = torch.randn(31, 5, generator=torch.Generator().manual_seed(1))
    query, passage = prepared.merge_embeddings(leaves, torch.device(device))
    assert (query.device.type, len(query), len(passage)) == (device, 11, 20)
    assert torch.equal(torch.cat([query, passage]).cpu(), whole)
    ((query * weights[:11].to(device)).sum() + (passage.square() * weights[11:].to(device)).sum()).backward()
    expected = torch.cat([weights[:11], 2 * whole[11:] * weights[11:]])
    for leaf, (first, rows) in zip(leaves, cuts, strict=True):
        assert leaf.grad is not None and leaf.grad.device == leaf.device
        torch.testing.assert_close(leaf.grad, expected[first + rows])
