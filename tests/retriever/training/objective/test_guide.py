"""When a guide embeds: before the first step, into stores in the cache, or beside the towers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import MEANINGS, write_beir, write_lines
from run_helpers import assert_same, results

from index.files import InputError
from index.progress import SilentReporter
from retriever.config.loss_options import GuideConfig, TeacherConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import config_from_mapping
from retriever.errors import ConfigError
from retriever.models.modality import build_towers
from retriever.training.objective.checks import check_objective
from retriever.training.objective.guide import GuideModel, StoredGuide
from retriever.training.train import plan_run
from retriever.training.trainer import Trainer


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    for seed, name in enumerate(("model", "guide")):
        torch.manual_seed(seed)
        (tmp_path / name).mkdir()
        build_towers(tiny).save(tmp_path / name)
    rows: list[object] = [
        {"query": f"what is a {word}?", "positive": f"{word} {meaning}", "negatives": [meaning, word]}
        for word, meaning in MEANINGS.items()
    ]
    settings = {
        "out": str(tmp_path / "run"),
        "model": {"name": str(tmp_path / "model"), "dropout": 0.0},
        "data": {
            "sources": [{"path": str(write_lines(tmp_path / "pairs.jsonl", rows))}],
            "cache": str(tmp_path / "cache"),
            "workers": 0,
            "negatives": 1,
            "corpus": str(write_beir(tmp_path / "words")),
            "random_passages": 5,
        },
        "loss": {"guide": {"model": str(tmp_path / "guide"), "margin": 0.01, "embed": "before"}},
        "batch_size": 8,
        "steps": 3,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return config_from_mapping(settings)


def with_guide(config: TrainConfig, **changes: Any) -> TrainConfig:
    guide = dataclasses.replace(config.loss.guide, **changes)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, guide=guide))


def stores(config: TrainConfig) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(config.data.cache or "").glob("texts-*/*.npy")}


def test_texts_are_embedded_once_and_give_the_masks_of_embedding_beside_the_towers(
    config: TrainConfig, tmp_path: Path
) -> None:
    trainer = Trainer.start(config, SilentReporter())
    assert isinstance(trainer.train_step.guide, StoredGuide)
    trainer.train()
    rows = results(tmp_path / "run")["rows"]
    assert all(row["pool_masked_guide"] > 0 for row in rows)
    beside = dataclasses.replace(with_guide(config, embed="beside"), out=str(tmp_path / "beside"))
    other = Trainer.start(beside, SilentReporter())
    assert isinstance(other.train_step.guide, GuideModel)
    other.train()
    for row, expected in zip(rows, results(tmp_path / "beside")["rows"], strict=True):
        for name in ("loss", "pool_masked_guide", "pool_masked"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    # A second run reads the stores; auto does so, too.
    written = stores(config)
    assert len(written) == 2
    again = dataclasses.replace(with_guide(config, embed="auto"), out=str(tmp_path / "again"), steps=1)
    assert isinstance(Trainer.start(again, SilentReporter()).train_step.guide, StoredGuide)
    assert stores(config) == written
    # Another model has other stores; a damaged one is refused.
    (shards,) = Path(config.data.cache or "").glob("texts-queries-*/*.npy")
    content = bytearray(shards.read_bytes())
    content[-1] ^= 1
    shards.write_bytes(content)
    with pytest.raises(InputError, match="texts-queries"):
        Trainer.start(dataclasses.replace(config, out=str(tmp_path / "damaged")), SilentReporter())


def test_auto_embeds_before_where_texts_repeat(config: TrainConfig, tmp_path: Path) -> None:
    # 20 rows with 4 texts each and 20 passages of the corpus; a step draws 8 rows with 3 texts, and 5 passages.
    for steps, kind in ((6, GuideModel), (7, StoredGuide)):
        chosen = dataclasses.replace(with_guide(config, embed="auto"), steps=steps, out=str(tmp_path / str(steps)))
        assert isinstance(Trainer.start(chosen, SilentReporter()).train_step.guide, kind)


def test_mined_texts_cannot_be_embedded_before(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"^mine_every does not combine with loss.guide.embed before"):
        check_objective(dataclasses.replace(config, mine_every=2))
    with pytest.raises(ValueError, match=r"^loss.guide.embed: expected auto without loss.guide.model, found before"):
        GuideConfig(embed="before")


def test_an_interrupted_run_continues_with_the_stores(config: TrainConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), checkpoint_every=1)
    Trainer.start(whole, SilentReporter()).train()
    config = dataclasses.replace(config, checkpoint_every=1)
    trainer = Trainer.start(config, SilentReporter())
    step = trainer.train_step

    def stopped(batch: Any, number: int, **options: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return step(batch, number, **options)

    object.__setattr__(trainer.components, "train_step", stopped)
    stopped.objectives = step.objectives  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    Trainer.resume(Path(config.out), SilentReporter()).train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))
    assert json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_a_plan_counts_guide_teacher_and_random_passages(config: TrainConfig, tmp_path: Path) -> None:
    teacher = {"kind": "pool_kl", "model": str(tmp_path / "model")}
    loss = dataclasses.replace(config.loss, guide=GuideConfig(), teacher=TeacherConfig(**teacher))
    dimension, texts = 32, 8 * 3 + 5
    for chosen, kind, words in (
        (config, "guide", "guide: embeds 20 queries and 60 passages once, before the first step; 0 MiB of stores"),
        (with_guide(config, embed="beside"), "guide", f"guide: embeds the {texts} texts of each step, beside the"),
        (dataclasses.replace(config, loss=loss), "teacher", "teacher: embeds 20 queries and 60 passages once, before"),
    ):
        plan = plan_run(chosen)
        assert any(words in line for line in plan.lines()), plan.lines()
        assert "random passages: 5 of the passages of a step" in "\n".join(plan.lines())
        assert plan.step[f"embeddings of the {kind}"] == 4 * texts * dimension
        # Nothing was embedded.
        assert not stores(config)
    Trainer.start(config, SilentReporter())
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    assert any(
        "guide: its embeddings of 20 queries and 60 passages are in the cache" in n for n in plan_run(again).notes
    )
