"""SentenceTransformerTrainer with these losses equals a plain training loop, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import LoadedPython
from torch import Tensor

pytest.importorskip("datasets")
pytest.importorskip("accelerate")
from ranking_loss_helpers import plain_loop, save_bert, triplets
from ranking_loss_trainer import CACHED, ROWS, train
from safetensors.torch import load_file

from retriever.config.model import ModelConfig
from retriever.sentence_transformers import CachedInfCLRankingLoss, InfCLRankingLoss

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_bert(tiny.tokenizer, made := tmp_path_factory.mktemp("bert"))
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[dict[str, Tensor], float]:
    return plain_loop(folder, triplets(ROWS), 3)


def cached(model: Any) -> CachedInfCLRankingLoss:
    return CachedInfCLRankingLoss(model, **CACHED)


@pytest.mark.parametrize("make", [InfCLRankingLoss, cached])
def test_training_equals_a_plain_loop(
    folder: Path, tmp_path: Path, expected: tuple[dict[str, Tensor], float], make: Any
) -> None:
    weights, scale = expected
    trainer = train(folder, tmp_path, make)
    torch.testing.assert_close(trainer.model.state_dict(), weights, rtol=1e-5, atol=1e-5)
    assert trainer.loss.scale == pytest.approx(scale, rel=1e-5)
    assert abs(scale - 20) > 0.01


def test_two_processes_train_the_same_weights_as_one(
    folder: Path, tmp_path: Path, expected: tuple[dict[str, Tensor], float]
) -> None:
    with LoadedPython("sentence_transformers", "accelerate", "torch.distributed") as python:
        done = python.run(HERE / "ranking_loss_trainer.py", folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    accumulated = train(folder, tmp_path, cached, rows=2 * ROWS, gradient_accumulation_steps=2)
    expected_runs = {
        "plain": expected,
        "cached": expected,
        "accumulated": (accumulated.model.state_dict(), accumulated.loss.scale),
    }
    for name, (weights, scale) in expected_runs.items():
        for rank in range(2):
            found = load_file(folder / f"{name}{rank}.safetensors")
            assert float(found.pop("scale")) == pytest.approx(scale, rel=1e-5)
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    options |= {"learning_rate_mapping": {"log_logit_scale": 0.1}, "adam_epsilon": 1e-3}
    whole = train(folder, tmp_path, cached, **options)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = train(folder, tmp_path / "again", cached, resume=str(checkpoint), **options)
    assert resumed.state.global_step == 3
    torch.testing.assert_close(resumed.loss.state_dict(), whole.loss.state_dict(), rtol=1e-6, atol=1e-6)
    assert abs(whole.loss.scale - 20) > 1
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["LearnedScaleCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    anew = train(folder, tmp_path / "anew", cached, resume=str(checkpoint), **options)
    assert abs(anew.loss.scale - whole.loss.scale) > 1
    state = json.loads((tmp_path / "anew" / "checkpoint-3" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["LearnedScaleCallback"]["attributes"]["log_logit_scales"]
    assert saved == [anew.loss.infonce.log_logit_scale.item()]


def test_the_model_card_names_the_papers_and_the_arguments(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path, cached, max_steps=1).model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2410.17243" in card and "2101.06983" in card
    assert '"mini_batch_num_tokens": 9' in card and '"similarity_fct": "cos_sim"' in card
