"""Which model a run keeps: the first dev evaluation, several dev sets, the dev loss, the average of the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import write_beir
from run_helpers import assert_same, results
from safetensors.torch import load_file

from index.beir import BeirDataset
from index.progress import SilentReporter
from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.errors import ConfigError
from retriever.training.step import TrainStep
from retriever.training.trainer import Trainer
from retriever.training.validation.dev_loss import DevPairs
from retriever.training.validation.dev_sets import open_dev_set
from retriever.utils.interrupt import Interrupted


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    """A run of six steps with two dev sets, the dev loss and an average of the weights."""
    one, two = write_beir(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(one, two)
    qrels = two / "qrels" / "dev.tsv"
    lines = qrels.read_text().splitlines()
    (two / "qrels" / "half.tsv").write_text("\n".join(lines[: len(lines) // 2 + 1]) + "\n")
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=tiny,
        data=DataConfig(sources=(SourceConfig(path=str(one)),), workers=0),
        loss=LossConfig(learn_logit_scale=True),
        optim=OptimConfig(lr=1e-2, ema=0.5),
        dev=DevConfig(paths=(str(one), f"{two}:half"), every=2, loss=True),
        batch_size=8,
        steps=6,
        log_every=1,
        checkpoint_every=2,
        precision="fp32",
    )


def test_a_run_with_an_average_and_dev_sets_resumes_bit_for_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    averages, evaluated = [], []
    step = TrainStep.__call__

    def recorded(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        if train_step.config.out == config.out and number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        result = step(train_step, batch, number, **options)
        weight = next(p for p in train_step.towers.parameters() if p.ndim > 1).detach().clone()
        averages.append(weight)
        return result

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    trainer = Trainer.start(whole, SilentReporter())
    first = next(p for p in trainer.towers.parameters() if p.ndim > 1).detach().clone()
    trainer.train()
    # The average is that of its equation, and it is what has been saved.
    expected = first
    for number, weight in enumerate(averages, start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight
        evaluated.append(expected)
    saved = load_file(tmp_path / "whole" / "checkpoints" / "step-00000006" / "average.safetensors")
    (average,) = (tensor for name, tensor in saved.items() if name.endswith("word_embeddings/weight"))
    torch.testing.assert_close(average, evaluated[-1])
    assert not torch.allclose(evaluated[-1], averages[-1])
    best = trainer.state.best_step
    kept = load_file(trainer.run / "model" / "model.safetensors")["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(kept, evaluated[best - 1])

    with pytest.raises(Interrupted):
        Trainer.start(config, SilentReporter()).train()
    resumed = Trainer.resume(Path(config.out), SilentReporter())
    assert resumed.state.step == 4
    resumed.train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))

    rows = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text().splitlines()]
    dev = [row for row in rows if "dev_ndcg@10" in row]
    assert [row["step"] for row in dev] == [0, 2, 4, 6]
    for row in dev:
        for name in ("ndcg@10", "recall@100", "loss"):
            assert row[f"dev_{name}"] == pytest.approx((row[f"dev_one_{name}"] + row[f"dev_two:half_{name}"]) / 2)
    assert dev[0]["dev_loss"] > dev[-1]["dev_loss"]
    assert trainer.state.best_score == max(row["dev_ndcg@10"] for row in dev[1:])
    assert not list(trainer.run.glob(".dev*"))


def test_the_dev_loss_equals_the_full_softmax(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    texts = {f"p{i}": f"passage {i}" for i in range(5)}
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in texts.items()))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": str(i)}) + "\n" for i in range(4))
    )
    # q0's best passage is p1; p0 is q1's, and so masked for q0. q3 has q2's passage. p4 is not relevant.
    judged = [("q0", "p0", 1), ("q0", "p1", 2), ("q1", "p0", 1), ("q2", "p3", 1), ("q3", "p3", 1), ("q3", "p4", 0)]
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{p}\t{g}" for q, p, g in judged)]
    (folder / "qrels" / "dev.tsv").write_text("\n".join(lines) + "\n")
    pairs = DevPairs.of(BeirDataset.open(folder, "dev"))
    assert dict(zip(pairs.queries, pairs.passages, strict=True)) == {
        "0": "passage 1",
        "1": "passage 0",
        "2": "passage 3",
        "3": "passage 3",
    }
    random = np.random.default_rng(0)
    vectors = {text: random.normal(size=8).astype(np.float32) for text in (*pairs.queries, *texts.values())}
    scale = 1.5
    rows = []
    for query, passage in zip(pairs.queries, pairs.passages, strict=True):
        masked = {"0": {"passage 0"}}.get(query, set())
        # p3 is in the batch twice: once for each of its queries, of which the other one is masked.
        candidates = [text for text in pairs.passages if text not in masked | {passage}]
        logits = [scale * vectors[query] @ vectors[text] for text in (passage, *candidates)]
        rows.append(math.log(sum(map(math.exp, logits))) - logits[0])

    class Towers:
        device = torch.device("cpu")

    class Loss:
        logit_scale = torch.tensor(scale)

    with pytest.MonkeyPatch.context() as patch:
        found = lambda towers, texts, *_: np.stack([vectors[text] for text in texts])  # noqa: E731
        patch.setattr("retriever.training.validation.dev_loss.embed_texts", found)
        value = pairs.loss(Towers(), Loss(), 4, Any)  # type: ignore[arg-type]
    assert value == pytest.approx(np.mean(rows), rel=1e-5)


def test_dev_sets_are_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    other = tmp_path / "copies"
    shutil.copytree(tmp_path / "one", other / "one")
    twice = dataclasses.replace(config.dev, paths=(config.dev.paths[0], str(other / "one")))
    with pytest.raises(ConfigError, match=r"dev\.paths: expected sets with different names, found one twice"):
        open_dev_set(twice, images=False)
    with pytest.raises(ValueError, match=r"dev\.paths: expected either dev\.path or dev.paths"):
        DevConfig(path="a", paths=("b",))
