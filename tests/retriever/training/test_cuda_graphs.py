"""Replayed CUDA graphs give the results of passes launched one kernel at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from index.progress import SilentReporter
from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.images import ImageConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.errors import ConfigError
from retriever.models.mixed_precision import half_precision_weights, mixed_precision
from retriever.models.modality import build_towers
from retriever.models.packed.attention import PackedLayout
from retriever.models.towers import Towers
from retriever.training.cuda_graphs import (
    Inputs,
    captured_size,
    check_cuda_graphs,
    release_cuda_graphs,
    use_cuda_graphs,
)
from retriever.training.trainer import Trainer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def towers_of(tiny: ModelConfig, kind: str = "bert", **settings: Any) -> Towers:
    torch.manual_seed(0)
    architecture = {"model_type": kind, **SMALL, **settings}
    return build_towers(ModelConfig(architecture=architecture, tokenizer=tiny.tokenizer, pooling="mean"))


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 4095, 4097, 20000, 32768])
def test_captured_sizes_are_at_most_a_sixteenth_or_256_larger(tokens: int) -> None:
    size = captured_size(tokens)
    assert 0 <= size - tokens < max(256, tokens / 16 + 1) and captured_size(size) == size


def test_padding_tokens_do_not_change_embeddings(tiny: ModelConfig) -> None:
    towers = towers_of(tiny).eval()
    assert towers.enable_packing()
    encoder = towers.encoders[0]
    inputs = Inputs(24, torch.device("cpu"))
    # The second batch is shorter and leaves tokens of the first in the buffer.
    for lengths in ([7, 1, 9], [2, 3]):
        layout, tokens = PackedLayout.of(np.array(lengths)), sum(lengths)
        ids, positions = torch.arange(5, 5 + tokens)[None], (torch.arange(tokens) - layout.start)[None]
        inputs.fill(ids, positions, layout)
        alone = encoder(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state
        # On a CPU attention uses the offsets, which the GPU kernels do not read.
        padded = PackedLayout.of(np.array([*lengths, *[1] * (24 - tokens)]))
        assert torch.equal(inputs.layout.start, padded.start) and torch.equal(inputs.layout.end, padded.end)
        packed = encoder(input_ids=inputs.input_ids, position_ids=inputs.position_ids, layout=padded).last_hidden_state
        torch.testing.assert_close(packed[:, :tokens], alone, rtol=0, atol=1e-6)


def test_bf16_weights_keep_their_addresses(tiny: ModelConfig) -> None:
    encoder = towers_of(tiny).encoders[0]

    def addresses() -> list[int]:
        with half_precision_weights([encoder], torch.bfloat16):
            with half_precision_weights([encoder], torch.bfloat16):  # as in an evaluation
                pass
            return [weight.data_ptr() for weight in encoder.parameters()]

    first = addresses()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(1)
    assert addresses() == first
    with half_precision_weights([encoder], torch.bfloat16):
        halves = [weight.detach().clone() for weight in encoder.parameters()]
    assert all(torch.equal(half, whole.bfloat16()) for half, whole in zip(halves, encoder.parameters(), strict=True))


def test_unsupported_combinations_are_refused(tiny: ModelConfig) -> None:
    for other in ("compile", "gradient_checkpointing", "shard_towers"):
        with pytest.raises(ValueError, match=f"{other}: expected false with cuda_graphs, found true"):
            TrainConfig(cuda_graphs=True, **{other: True})
    images = ModelConfig(image=ImageConfig(name="ViT-B/32"))
    with pytest.raises(ValueError, match="cuda_graphs: expected false with an image tower, found true"):
        TrainConfig(cuda_graphs=True, model=images)
    with pytest.raises(ConfigError, match="cuda_graphs: expected bf16 on a GPU, found fp32 on cpu"):
        check_cuda_graphs(towers_of(tiny), "fp32")


def test_an_unsupported_run_is_not_started(tiny: ModelConfig, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), model=tiny, cuda_graphs=True, device="cpu", precision="fp32")
    with pytest.raises(ConfigError, match="cuda_graphs: expected bf16 on a GPU, found fp32 on cpu"):
        Trainer.start(config, Terminal())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
def test_replayed_passes_equal_launched_ones(tiny: ModelConfig, kind: str) -> None:
    settings = {"modernbert": {"local_attention": 16}, "qwen3": {"num_key_value_heads": 2, "head_dim": 16}}
    plain = towers_of(tiny, kind, **settings.get(kind, {})).cuda()
    assert plain.enable_packing()
    graphed = copy.deepcopy(towers_of(tiny, kind, **settings.get(kind, {}))).cuda()
    assert graphed.enable_packing()
    check_cuda_graphs(graphed, "bf16")
    use_cuda_graphs(graphed)
    outcomes = []
    for towers in (plain, graphed):
        generator, found = np.random.default_rng(0), []
        for step, texts in enumerate((30, 33, 90, 31, 60)):
            tokens = towers.tokenizer("query")(["ab " * n for n in generator.integers(1, 40, texts)])
            torch.manual_seed(step)
            with mixed_precision(towers, "bf16"):
                embeddings = towers.embed(tokens, np.arange(texts), "query")
                # A second forward before the first backward must not overwrite what that backward reads.
                second = towers.embed(tokens, np.arange(texts), "query")
                upstream = torch.linspace(-1, 1, embeddings.numel(), device="cuda").view_as(embeddings)
                ((embeddings + second) * upstream).sum().backward()
            found.append(
                (embeddings.detach(), {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None})
            )
            with torch.no_grad():
                for weight in towers.parameters():
                    if weight.grad is not None:
                        weight.add_(weight.grad.sign(), alpha=-1e-3)
                    weight.grad = None
        outcomes.append(found)
    assert 2 <= len(graphed.encoders[0].forward.captures) <= 4
    for (embeddings, gradients), (expected, expected_gradients) in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=2e-2)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            error = float((gradient - expected_gradients[name]).norm() / expected_gradients[name].norm())
            assert error < 5e-2, f"{name}: {error}"


def test_released_graphs_leave_the_encoder_as_it_was(tiny: ModelConfig) -> None:
    towers = towers_of(tiny)
    (encoder,) = towers.encoders
    before = dict(vars(encoder))
    use_cuda_graphs(towers)
    assert vars(encoder).keys() - before.keys() == {"forward"}
    release_cuda_graphs(towers)
    assert vars(encoder) == before
    release_cuda_graphs(towers)


class Lines(SilentReporter):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.gpu
def test_runs_that_follow_each_other_in_a_process_train(tiny: ModelConfig, tmp_path: Path) -> None:
    rows = [{"query": f"q {i} " * (1 + i % 7), "positive": f"p {i} " * (1 + i % 5)} for i in range(300)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(sources=(SourceConfig(str(source)),))
    for run in range(3):
        config = TrainConfig(out=str(tmp_path / f"run-{run}"), model=tiny, data=data, batch_size=50, epochs=3)
        reporter = Lines()
        trainer = Trainer.start(config, reporter)
        trainer.train()
        assert any(line.startswith("CUDA graphs") for line in reporter.lines), reporter.lines
        assert not any("forward" in vars(encoder) for encoder in trainer.towers.encoders)
