"""Training that goes wrong says so: spikes, collapse, zero gradients and weights, an edited configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import command, write_config, write_pairs
from torch import Tensor

from retriever.cli.terminal import Terminal
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import load_config
from retriever.training import grad_cache
from retriever.training.health import spikes
from retriever.training.health.collapse import effective_rank, zero_weights
from retriever.training.health.config_change import changed_fields, config_tree
from retriever.training.health.spikes import LossSpikes
from retriever.training.trainer import Trainer


def test_a_spike_is_far_above_the_median_and_does_not_move_it() -> None:
    losses = LossSpikes()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 300)
    for step in range(200):
        assert not losses.add(5 * np.exp(-step / 50) + 1 + noise[step]), step
    for _ in range(5):
        assert losses.add(4.0)
    assert losses.in_a_row == 5 and abs(losses.median - 1.1) < 0.1
    assert not losses.add(1.2) and losses.in_a_row == 0
    # Equal losses: a change of a quarter is none.
    constant = LossSpikes([1.0] * 20)
    assert not constant.add(1.25) and constant.add(1.6)
    assert not LossSpikes([1.0] * 15).add(100.0)
    assert not losses.add(float("nan")) and np.isfinite(losses.losses).all()


def test_effective_rank_is_that_of_the_singular_values() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 24))
    singular = np.linalg.svd(vectors, compute_uv=False)
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert effective_rank(torch.from_numpy(vectors)) == pytest.approx(expected, rel=1e-6)
    one = torch.from_numpy(np.tile(vectors[:1], (40, 1)) + 1e-6 * vectors).float()
    assert effective_rank(one) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.full((40, 24), float("nan"))) is None
    assert effective_rank(torch.zeros(40, 24)) is None and effective_rank(torch.ones(3, 24)) is None
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(layers[1].weight)
    assert zero_weights(layers) == ["1.weight"]


@pytest.fixture(scope="module")
def config(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("health")
    file = write_config(
        *(folder / "run.yaml", dataclasses.replace(tiny, dropout=0.0), write_pairs(folder / "pairs.jsonl")),
        **{"steps": 8, "checkpoint_every": 3, "log_every": 1, "keep_checkpoints": 9, "batch_size": 8},
    )
    return load_config(file)


def _train_with_spikes(config: TrainConfig, at: set[int], monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Train, with a loss and gradients of 100 times their size at some steps. Returns the weights after each step."""
    real, calls, weights = grad_cache.backward, 0, {}
    monkeypatch.setattr(spikes, "MIN_LOSSES", 3)

    def spiked(embed: Any, micro_batches: Any, loss_of: Any, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        factor = 100.0 if calls in at else 1.0
        return real(embed, micro_batches, lambda embeddings: loss_of(embeddings) * factor, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(grad_cache, "backward", spiked)
        trainer = Trainer.start(config, Terminal())
        step = type(trainer.train_step).__call__

        def noted(self: Any, batch: Any, number: int, **options: Any) -> Any:
            weights[number] = torch.cat([p.detach().flatten().clone() for p in trainer.towers.parameters()])
            return step(self, batch, number, **options)

        patch.setattr(type(trainer.train_step), "__call__", noted)
        trainer.train()
    weights[8] = torch.cat([p.detach().flatten().clone() for p in trainer.towers.parameters()])
    return weights


def test_a_spike_is_told_skipped_or_rolled_back(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, output = {}, {}
    for reaction in ("warn", "skip", "roll_back"):
        run = dataclasses.replace(config, out=str(tmp_path / reaction), loss_spikes=reaction)
        found[reaction] = _train_with_spikes(run, {6}, monkeypatch)
        output[reaction] = " ".join(capsys.readouterr().err.split())
    assert "step 6: the loss" in output["warn"] and "is a spike" in output["warn"]
    assert not torch.equal(found["warn"][6], found["warn"][5])
    assert "step 6: skipped: its loss" in output["skip"]
    assert torch.equal(found["skip"][6], found["skip"][5]) and torch.equal(found["skip"][5], found["warn"][5])
    assert "rolled back to the weights of step 3; continuing with the next batch" in output["roll_back"]
    assert torch.equal(found["roll_back"][6], found["roll_back"][3])
    # A run that is resumed from before the spike does the same.
    again = Trainer.resume(tmp_path / "skip", Terminal())
    assert len(again.state.losses) == 7


def test_zero_gradients_and_a_changed_configuration_are_told(config: TrainConfig, tmp_path: Path) -> None:
    import yaml

    tree = yaml.safe_load(yaml.safe_dump(config_tree(config)))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "run"), "steps": 4}))
    assert command("train", file).code == 0
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("lr: 0.001", "lr: 0.0005").replace("log_every: 1", "log_every: 2"))
    outcome = command("train", "--resume", tmp_path / "run")
    shown = " ".join((outcome.out + outcome.err).split())
    assert (
        outcome.code == 0 and "config.yaml was changed since step 4: optim.lr 0.001 -> 0.0005; the new values" in shown
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert changed_fields({"a": 1, "b": {"c": [1]}, "old": 2}, {"a": 1, "b": {"c": [2]}, "new": 3}) == [
        "b.c [1] -> [2]"
    ]


def test_collapse_and_zero_weights_are_told(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer.start(dataclasses.replace(config, out=str(tmp_path / "run"), steps=2), Terminal())
    with torch.no_grad():
        for weight in trainer.towers.parameters():
            weight.zero_()
    trainer.train()
    shown = " ".join(capsys.readouterr().err.split())
    assert "weight matrices are zero" in shown and "all gradients are 0" in shown
