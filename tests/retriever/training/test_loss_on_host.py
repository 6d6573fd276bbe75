"""A loss on the CPU for towers on a GPU, as on Apple's GPUs, which have no float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import World, command, write_config

from retriever.config.model import ModelConfig
from retriever.training import components, step


@pytest.mark.gpu
def test_a_loss_on_the_cpu_gives_the_same_run(
    world: World, tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for name in ("device", "host"):
        if name == "host":
            for module in (components, step):
                monkeypatch.setattr(module, "loss_device", lambda device: torch.device("cpu"))
        loss = {"learn_logit_scale": True, "symmetric": True}
        config = write_config(
            tmp_path / f"{name}.yaml", tiny, world.pairs, device="cuda", loss=loss, log_every=1, steps=6
        )
        outcome = command("train", config)
        assert outcome.code == 0, outcome.err
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
