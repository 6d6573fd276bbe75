"""Micro-batches fit into the memory for graphs and leave little of it unused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions, embed_windows
from retriever.encoding.windows import WINDOW
from retriever.models import memory as graph_memory
from retriever.models.memory import MAX_TOKENS, MIN_TOKENS, EncodeMemory, GraphMemory, fitting_tokens
from retriever.models.mixed_precision import mixed_precision
from retriever.models.modality import build_towers


@pytest.mark.parametrize("most", [10_000, 40_000, 150_000, 300_000, 423_000, 1_000_000])
def test_full_micro_batches_fill_the_memory(most: int) -> None:
    tokens = fitting_tokens(most)
    assert MIN_TOKENS <= tokens <= MAX_TOKENS
    kept = int(most / tokens - 0.25)
    assert kept >= 1 and (kept + 0.25) * tokens <= most
    # The unused memory is less than the rounding of micro-batches to multiples of 1024.
    assert most - (kept + 0.25) * tokens <= (kept + 1) * 1024


def test_the_number_of_kept_graphs_is_described() -> None:
    memory = GraphMemory(micro_batch_tokens=100, graph_tokens=150)
    assert memory.kept([40, 100, 90]) == 1
    assert memory.describe([40, 100, 90]) == (
        "230 tokens a step in 3 micro-batches of at most 100: 1 keep their graph until the loss, 2 run twice"
    )
    assert memory.describe([40, 100]).endswith("2 keep their graph until the loss, 0 run twice")


def test_on_a_cpu_graphs_take_a_quarter_of_free_memory(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = build_towers(tiny)
    token_bytes = graph_memory.graph_bytes(towers, "fp32")
    assert 0 < token_bytes < 1e6

    def planned(room: float) -> GraphMemory:
        monkeypatch.setattr(graph_memory, "available_bytes", lambda: int(room))
        return GraphMemory.plan(towers, "fp32", texts=10, workspace_mib=1, micro_batch_tokens=100)

    assert planned(4 * 5000 * token_bytes).graph_tokens == pytest.approx(5000, abs=1)
    # One micro-batch may always keep its graph.
    assert planned(0) == GraphMemory(micro_batch_tokens=100, graph_tokens=100)


def test_the_memory_limit_of_a_container_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = graph_memory.available_bytes()
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        (groups := tmp_path / limit / folder).mkdir(parents=True)
        monkeypatch.setattr(graph_memory, "Path", lambda _, *parts, root=tmp_path / limit: root.joinpath(*parts))
        (groups / used).write_text("300\n")
        (groups / limit).write_text("max\n")
        assert graph_memory.available_bytes() == pytest.approx(free, rel=0.5)
        (groups / limit).write_text("1300\n")
        assert graph_memory.available_bytes() == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert graph_memory.available_bytes() == 250


def test_encoding_uses_the_given_micro_batch_size(tiny: ModelConfig) -> None:
    towers = build_towers(tiny).eval()
    assert EncodeMemory.plan(towers, texts=10, micro_batch_tokens=77).micro_batch_tokens == 77
    assert EncodeMemory.plan(towers, texts=10).micro_batch_tokens == 4096


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "mpnet", "electra"])
@pytest.mark.parametrize("length", [20, 250])
def test_peak_memory_of_encoding_is_predicted(tiny: ModelConfig, kind: str, length: int) -> None:
    architecture = {"model_type": kind, "num_hidden_layers": 2}
    towers = build_towers(ModelConfig(architecture=architecture, tokenizer=tiny.tokenizer, max_length=500))
    towers.to("cuda").eval().enable_packing()
    tokens = towers.tokenizer("document")(["a " * (length - 2)] * WINDOW)
    with mixed_precision(towers, "bf16"):
        memory = EncodeMemory.plan(towers, texts=WINDOW)
    torch.cuda.reset_peak_memory_stats()
    options = EncodeOptions("bf16", memory.micro_batch_tokens)
    assert len(list(embed_windows(towers, [(0, tokens), (1, tokens)], "document", options))) == 2
    measured = torch.cuda.max_memory_allocated()
    assert measured <= 1.05 * memory.peak
    # Models with quadratic attention memory are measured with the longest texts.
    assert kind != "bert" or measured >= 0.7 * memory.peak


@pytest.mark.gpu
def test_memory_is_left_for_cuda_graphs(tiny: ModelConfig) -> None:
    towers = build_towers(tiny).cuda().train()
    towers.enable_packing()

    def planned(cuda_graphs: bool | None, tokens: int) -> int:
        return GraphMemory.plan(
            towers, "bf16", texts=10, workspace_mib=1, micro_batch_tokens=tokens, cuda_graphs=cuda_graphs
        ).graph_tokens

    assert planned(True, 8192) <= planned(False, 8192) - 8192
    assert planned(None, 8192) == pytest.approx(planned(True, 8192), rel=0.01)
    # Larger micro-batches run without graphs.
    assert planned(None, 65536) == pytest.approx(planned(False, 65536), rel=0.01)
