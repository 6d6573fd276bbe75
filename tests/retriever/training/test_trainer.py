"""A run trains, and a run that was interrupted and resumed equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import LoadedPython
from run_helpers import assert_same, losses, results
from safetensors.torch import load_file

import retriever.training.validation.dev_set as validation
from index.files import InputError
from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import CONFIG_FILE, load_config, save_config
from retriever.models import memory as graph_memory
from retriever.training.checkpoint import load_checkpoint
from retriever.training.step import TrainStep
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted

WORDS = ["cat", "dog", "run", "walk", "eat", "sleep", "tree", "house", "river", "stone", "blue", "red", "small", "old"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder in which each query has the words of its passage in another order."""
    folder = tmp_path_factory.mktemp("data") / "words"
    (folder / "qrels").mkdir(parents=True)
    random = np.random.default_rng(0)
    passages = [" ".join(random.choice(WORDS, size=4)) for _ in range(60)]
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for i, passage in enumerate(passages):
            corpus.write(json.dumps({"_id": f"p{i}", "title": "", "text": passage}) + "\n")
            shuffled = " ".join(random.permutation(passage.split()))
            queries.write(json.dumps({"_id": f"q{i}", "text": shuffled}) + "\n")
    for split, rows in (("train", range(48)), ("dev", range(48, 60))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(data: Path, tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=tiny,
        data=DataConfig(sources=(SourceConfig(path=str(data)),), workers=0),
        loss=LossConfig(learn_logit_scale=True, symmetric=True),
        optim=OptimConfig(lr=1e-3),
        dev=DevConfig(path=str(data), every=4),
        batch_size=16,
        epochs=4,
        micro_batch_tokens=40,
        log_every=1,
        checkpoint_every=3,
        precision="fp32",
    )


def train(config: TrainConfig) -> Path:
    return Trainer.start(config, Terminal()).train()


def test_training_learns_and_writes_a_complete_run(config: TrainConfig) -> None:
    model = train(dataclasses.replace(config, epochs=20, dev=dataclasses.replace(config.dev, every=20)))
    run = Path(config.out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    scores = [row["dev_ndcg@10"] for row in rows if "dev_ndcg@10" in row]
    assert len(scores) == 4 and max(scores) > 0.5
    assert (model / "modules.json").exists()
    assert len(list((run / "checkpoints").iterdir())) == config.keep_checkpoints
    again = load_config(run / "config.yaml")
    assert again == dataclasses.replace(again) and again.micro_batch_tokens == 40
    scales = [row["logit_scale"] for row in rows if "logit_scale" in row]
    assert scales[-1] != scales[0]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7, 11])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, how: str
) -> None:
    config = dataclasses.replace(config, log_every=2)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)

    class Killed(Exception):
        pass

    step = TrainStep.__call__

    def interrupted_step(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        if number == stop_at:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(train_step, batch, number, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted_step)
        with pytest.raises(Killed if how == "kill" else Interrupted):
            train(config)
    torch.rand(5)  # random numbers drawn in between must not matter
    resumed = Trainer.resume(Path(config.out), Terminal())
    assert 0 < resumed.state.step <= stop_at + 1 or (how == "kill" and stop_at <= 3)
    resumed.train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))


@pytest.mark.parametrize("evaluation", [1, 3])
def test_an_interrupted_evaluation_is_repeated_on_resume(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    real = validation.evaluate_towers
    begun = 0

    def stopped(*arguments: Any, tick: Any, **options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == evaluation:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, tick=tick, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate_towers", stopped)
        with pytest.raises(Interrupted, match="SIGINT"):
            train(config)
    # The first evaluation is before the first step.
    step = 4 * (evaluation - 1)
    resumed = Trainer.resume(Path(config.out), Terminal())
    assert resumed.state.step == step and resumed.state.dev_step == (step - 4 if step else -1)
    resumed.train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))
    # Resuming a finished run does not repeat its evaluation.
    again = Trainer.resume(Path(config.out), Terminal())
    assert again.state == resumed.state and again.state.dev_step == 12
    again.train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))


def test_workers_do_not_change_the_run(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    other = dataclasses.replace(other, data=dataclasses.replace(config.data, workers=2))
    train(other)
    one, two = results(Path(config.out)), results(Path(other.out))
    assert_same(one, two)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_checkpoint_restores_every_tensor_in_its_dtype(config: TrainConfig, optimizer: str) -> None:
    config = dataclasses.replace(config, optim=OptimConfig(name=optimizer, lr=1e-3), steps=2)
    trainer = Trainer.start(config, Terminal())
    trainer.train()
    fresh = Trainer(config, Path(config.out), Terminal())
    load_checkpoint(Path(config.out) / "checkpoints" / "step-00000002", fresh.components.modules, fresh.optimizer)
    with_state = 0
    for one, other in zip(trainer.towers.parameters(), fresh.towers.parameters(), strict=True):
        assert torch.equal(one, other)
        before, after = trainer.optimizer.state[one], fresh.optimizer.state[other]
        # BERT's pooler is not used, so it has no gradient and no state.
        assert before.keys() == after.keys()
        with_state += len(before) >= 3
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[key].dtype and torch.equal(value, after[key])
            else:
                assert value == after[key]
    assert with_state > 30


def test_micro_batches_do_not_change_a_step(config: TrainConfig, tmp_path: Path) -> None:
    rows = []
    for budget in (40, 100_000):
        model = dataclasses.replace(config.model, dropout=0.0)
        one = dataclasses.replace(
            config, out=str(tmp_path / str(budget)), model=model, micro_batch_tokens=budget, dev=DevConfig()
        )
        train(one)
        rows.append([json.loads(line)["loss"] for line in (Path(one.out) / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4)


def test_early_stopping_keeps_the_best_model(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.3, 0.5, 0.4, 0.2, 0.9])  # the first before training
    real = validation.evaluate_towers

    def scripted(*arguments: Any, **options: Any) -> Any:
        run, metrics = real(*arguments, **options)
        return run, dataclasses.replace(metrics, mean={**metrics.mean, "ndcg@10": next(scores)})

    monkeypatch.setattr(validation, "evaluate_towers", scripted)
    dev = dataclasses.replace(config.dev, every=2, patience=2)
    trainer = Trainer.start(dataclasses.replace(config, dev=dev, checkpoint_every=2, keep_checkpoints=9), Terminal())
    trainer.train()
    assert (trainer.state.step, trainer.state.best_step, trainer.state.best_score) == (8, 4, 0.5)
    best = load_file(Path(config.out) / "checkpoints" / "step-00000004" / "towers.safetensors")
    kept = load_file(Path(config.out) / "model" / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    (saved,) = (tensor for key, tensor in best.items() if key.endswith(name))
    assert torch.equal(kept[name], saved)


def test_existing_runs_and_changed_data_are_refused(config: TrainConfig, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(data, copied)
    source = SourceConfig(path=str(copied))
    config = dataclasses.replace(config, data=DataConfig(sources=(source,), workers=0), dev=DevConfig(), steps=2)
    train(config)
    with pytest.raises(InputError, match="holds a run already"):
        train(config)
    # The modification time does not matter.
    os.utime(copied / "queries.jsonl", (1, 1))
    assert Trainer.resume(Path(config.out), Terminal()).state.step == 2
    with (copied / "qrels" / "train.tsv").open("a") as qrels:
        qrels.write("q0\tp1\t1\n")
    with pytest.raises(InputError, match="the data changed"):
        Trainer.resume(Path(config.out), Terminal())
    with pytest.raises(InputError, match="expected the folder of a run"):
        Trainer.resume(tmp_path / "nowhere", Terminal())


def test_a_changed_dev_set_is_refused(config: TrainConfig, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(data, copied)
    config = dataclasses.replace(config, dev=DevConfig(path=str(copied)), steps=1)
    train(config)
    with (copied / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "new", "text": "new"}) + "\n")
    with pytest.raises(InputError, match="the data changed"):
        Trainer.resume(Path(config.out), Terminal())


def test_a_run_is_locked_while_it_trains(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer.start(dataclasses.replace(config, steps=1, dev=DevConfig()), Terminal())
    refused = []
    step = TrainStep.__call__

    def resume_in_step(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        with pytest.raises(InputError, match="another process") as caught:
            Trainer.resume(Path(config.out), Terminal())
        refused.append(caught.value)
        return step(train_step, batch, number, **options)

    monkeypatch.setattr(TrainStep, "__call__", resume_in_step)
    trainer.train()
    assert len(refused) == 1


def test_the_later_of_two_starts_in_one_folder_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, steps=1, dev=DevConfig())
    init = Trainer.__init__
    first_run: list[Trainer] = []

    def start_another_run(self: Trainer, *arguments: Any) -> None:
        init(self, *arguments)
        if not first_run:
            monkeypatch.setattr(Trainer, "__init__", init)
            first_run.append(Trainer.start(dataclasses.replace(config, seed=2), Terminal()))

    monkeypatch.setattr(Trainer, "__init__", start_another_run)
    with pytest.raises(InputError, match="holds a run already"):
        Trainer.start(config, Terminal())
    assert load_config(first_run[0].run / CONFIG_FILE).seed == 2


def test_too_few_steps_for_a_profile_are_refused_at_the_start(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="--profile: expected a run of at least 6 more steps, found 5"):
        Trainer.start(dataclasses.replace(config, steps=5, dev=DevConfig()), Terminal(), profile=True)
    assert not (Path(config.out) / CONFIG_FILE).exists()


def test_a_run_resumes_from_another_working_directory(
    config: TrainConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    sources = (SourceConfig(path=data.name),)
    config = dataclasses.replace(config, data=DataConfig(sources=sources, workers=0), dev=DevConfig(), steps=1)
    train(config)
    monkeypatch.chdir(tmp_path)
    assert Trainer.resume(Path(config.out), Terminal()).state.step == 1


def test_resumed_killed_runs_are_bitwise_equal_to_an_uninterrupted_one(
    python: LoadedPython, config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, out="", keep_checkpoints=1, checkpoint_every=2, steps=6)
    save_config(config, tmp_path / "run.yaml")
    parts = ["0.02", "0.2", "0.35", "0.45", "0.55", "0.7", "0.85", "0.99"]
    script = Path(__file__).parents[1] / "killed_runs.py"
    done = python.run(script, tmp_path / "run.yaml", *parts, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == parts


def test_a_damaged_checkpoint_is_refused_with_its_file(config: TrainConfig) -> None:
    train(dataclasses.replace(config, steps=2, dev=DevConfig()))
    file = Path(config.out) / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"optimizer\.safetensors: damaged"):
        Trainer.resume(Path(config.out), Terminal())


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(config: TrainConfig) -> None:
    config = dataclasses.replace(config, optim=OptimConfig(lr=1e30, max_grad_norm=None, warmup_fraction=0.0))
    trainer = Trainer.start(dataclasses.replace(config, dev=DevConfig()), Terminal())
    with pytest.raises(InputError, match=r"step \d+: loss nan.*Lower optim.lr"):
        trainer.train()


def test_fp16_gradients_that_always_overflow_end_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, precision="fp16", dev=DevConfig(), steps=40)
    trainer = Trainer.start(config, Terminal())
    for parameter in trainer.towers.parameters():
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(InputError, match="no longer finite"):
        trainer.train()
    assert 10 < trainer.state.step < 40


def test_the_saved_configuration_is_resolved(config: TrainConfig) -> None:
    auto = dataclasses.replace(config, precision="auto", micro_batch_tokens=None, steps=1, dev=DevConfig())
    Trainer.start(auto, Terminal())
    tree = yaml.safe_load((Path(config.out) / "config.yaml").read_text())
    assert tree["precision"] in ("fp32", "bf16") and tree["micro_batch_tokens"] >= 2048


def losses_of(config: TrainConfig) -> list[float]:
    train(config)
    return losses(config)


def test_gradient_checkpointing_and_precision_change_only_rounding(config: TrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0), dev=DevConfig(), steps=6)
    expected = losses_of(dataclasses.replace(plain, out=str(tmp_path / "plain")))
    checkpointed = dataclasses.replace(plain, out=str(tmp_path / "checkpointed"), gradient_checkpointing=True)
    np.testing.assert_allclose(losses_of(checkpointed), expected, rtol=1e-5)
    for precision in ("bf16", "fp16"):
        rounded = losses_of(dataclasses.replace(plain, out=str(tmp_path / precision), precision=precision))
        np.testing.assert_allclose(rounded, expected, rtol=0.05)
        assert rounded != expected


def test_two_towers_with_projections_are_trained_separately(config: TrainConfig) -> None:
    model = dataclasses.replace(config.model, shared=False, projection=16)
    trainer = Trainer.start(dataclasses.replace(config, model=model, steps=2, dev=DevConfig()), Terminal())
    before = {name: parameter.detach().clone() for name, parameter in trainer.towers.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.towers.named_parameters() if not torch.equal(parameter, before[name])}
    for side in ("query", "document"):
        assert any(f".{side}." in name and "word_embeddings" in name for name in moved)
        assert any(f".{side}." in name and name.endswith("linear.weight") for name in moved)


def test_hard_negatives_add_passages_to_the_loss(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    rows = [{"query": f"{a} {b}", "positive": f"{b} {a}", "negatives": [f"{a} {a}"]} for a in WORDS for b in WORDS[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = (SourceConfig(path=str(path)),)
    losses = []
    for negatives in (0, 1):
        data = DataConfig(sources=sources, negatives=negatives, workers=0)
        one = dataclasses.replace(config, out=str(tmp_path / f"n{negatives}"), data=data, steps=1, dev=DevConfig())
        model = dataclasses.replace(config.model, dropout=0.0)
        losses += losses_of(dataclasses.replace(one, model=model, loss=LossConfig()))
    # With the same weights and pairs, every negative increases the loss of each row.
    assert losses[1] > losses[0] + 0.1


def test_tensorboard_events_equal_the_rows_of_the_run(config: TrainConfig) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    losses = losses_of(dataclasses.replace(config, steps=3, track=("tensorboard",)))
    events = event_accumulator.EventAccumulator(str(Path(config.out) / "tensorboard"))
    events.Reload()
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses, rtol=1e-6)
    assert [event.step for event in events.Scalars("dev_ndcg@10")] == [0, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_on_a_gpu_and_resumes(config: TrainConfig, precision: str) -> None:
    config = dataclasses.replace(config, device="cuda", precision=precision, epochs=20, dev=DevConfig())
    train(config)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert Trainer.resume(Path(config.out), Terminal()).state.step == 60


def test_recomputed_graphs_are_reported_once_and_do_not_change_the_run(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for room, kept in ((0, 1), (2**30, 17)):
        monkeypatch.setattr(graph_memory, "available_bytes", lambda room=room: room)
        trainer = Trainer.start(dataclasses.replace(config, steps=3, out=f"{config.out}-{room}"), Terminal())
        trainer.train()
        lines = [line for line in capsys.readouterr().err.splitlines() if "keep their graph" in line]
        assert len(lines) == 1 and f"micro-batches of at most 40: {kept} keep their graph until the loss" in lines[0]
        weights.append([p.detach() for p in trainer.towers.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_the_cache_may_be_outside_the_run_folder(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, steps=1, data=dataclasses.replace(config.data, cache=str(tmp_path / "cache")))
    out = tmp_path / "new" / "run"
    Trainer.start(dataclasses.replace(config, out=str(out)), Terminal()).train()
    assert (out / "model").is_dir() and (tmp_path / "cache").is_dir() and not (out / "cache").exists()
