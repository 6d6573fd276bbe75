"""Micro-batches fit the memory that there is for graphs, and leave little of it unused."""

from __future__ import annotations

import pytest
import torch

from retriever.config import ModelConfig
from retriever.encode import WINDOW, EncodeOptions, embed_windows
from retriever.graph_memory import LEAST_TOKENS, MOST_TOKENS, EncodeMemory, GraphMemory, fitting_tokens
from retriever.half_weights import arithmetic
from retriever.towers import build_towers


@pytest.mark.parametrize("most", [10_000, 40_000, 150_000, 300_000, 423_000, 1_000_000])
def test_whole_micro_batches_fill_the_memory(most: int) -> None:
    tokens = fitting_tokens(most)
    assert LEAST_TOKENS <= tokens <= MOST_TOKENS
    kept = int(most / tokens - 0.25)
    assert kept >= 1 and (kept + 0.25) * tokens <= most
    # Of what is planned for, less than the rounding to whole thousands of each is left over.
    assert most - (kept + 0.25) * tokens <= (kept + 1) * 1024


def test_the_choice_of_a_step_is_told() -> None:
    memory = GraphMemory(micro_batch_tokens=100, graph_tokens=150)
    assert memory.keep([40, 100, 90]) == 1
    assert memory.described([40, 100, 90]) == (
        "230 tokens a step in 3 micro-batches of at most 100: 1 keep their graph until the loss, 2 run twice"
    )
    assert memory.described([40, 100]).endswith("2 keep their graph until the loss, 0 run twice")


def test_encoding_takes_the_tokens_that_are_given(tiny: ModelConfig) -> None:
    towers = build_towers(tiny).eval()
    assert EncodeMemory.plan(towers, texts=10, micro_batch_tokens=77).micro_batch_tokens == 77
    assert EncodeMemory.plan(towers, texts=10).micro_batch_tokens == 4096


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "mpnet", "electra"])
@pytest.mark.parametrize("length", [20, 250])
def test_peak_of_encoding_is_foretold(tiny: ModelConfig, kind: str, length: int) -> None:
    architecture = {"model_type": kind, "num_hidden_layers": 2}
    towers = build_towers(ModelConfig(architecture=architecture, tokenizer=tiny.tokenizer, max_length=500))
    towers.to("cuda").eval().drop_padding()
    tokens = towers.tokenizer("document")(["a " * (length - 2)] * WINDOW)
    with arithmetic(towers, "bf16"):
        memory = EncodeMemory.plan(towers, texts=WINDOW)
    torch.cuda.reset_peak_memory_stats()
    options = EncodeOptions("bf16", memory.micro_batch_tokens)
    assert len(list(embed_windows(towers, [(0, tokens), (1, tokens)], "document", options))) == 2
    measured = torch.cuda.max_memory_allocated()
    assert measured <= 1.05 * memory.peak
    # What attends in memory for each pair of tokens is planned for the longest texts.
    assert kind != "bert" or measured >= 0.7 * memory.peak
