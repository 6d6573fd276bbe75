"""Training on images and captions: learning, exact resumption and locked towers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import LoadedPython
from image_helpers import captioned
from image_run_helpers import run_config, train, write_data
from run_helpers import assert_same, losses, results

from retriever.cli.terminal import Terminal
from retriever.config.dev import DevConfig
from retriever.config.images import ImageConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import save_config
from retriever.data.images.batches import ImageInputs
from retriever.data.micro_batches import PreparedBatch
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import embed_images
from retriever.models.images.towers import build_image_text_towers, load_image_text_towers
from retriever.models.memory import measure_graph_bytes
from retriever.training import grad_cache
from retriever.training.memory_plan import plan_step
from retriever.training.step import MicroBatch, TrainStep
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_data(folder)
    return folder


@pytest.fixture
def config(data_folder: Path, tmp_path: Path) -> TrainConfig:
    return run_config(data_folder, tmp_path / "run")


@pytest.mark.parametrize("loss", ["inf_cl", "sigmoid"])
def test_training_on_images_learns_and_keeps_the_best_model(loss: str, config: TrainConfig, data_folder: Path) -> None:
    config = dataclasses.replace(
        config,
        epochs=80,
        batch_size=32,
        optim=OptimConfig(lr=5e-4),
        micro_batch_tokens=None,
        model=dataclasses.replace(
            config.model, dropout=0.0, image=dataclasses.replace(config.model.image, augment=False)
        ),
        loss=dataclasses.replace(config.loss, name=loss, logit_scale=10.0, logit_bias=-4.0),
        dev=DevConfig(path=str(data_folder / "dev"), split="test", every=40),
    )
    model = train(config)
    found = losses(config)
    assert np.mean(found[-3:]) < 0.75 * np.mean(found[:3])
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    scores = [row["dev_recall@1"] for row in rows if "dev_recall@1" in row]
    # Before the first step, after 40 steps and at the end. Chance is 1/32.
    assert len(scores) == 3 and max(scores) > 0.3
    towers = load_image_text_towers(str(model))
    images_of_captions, captions = zip(*captioned(), strict=True)
    similarity = (
        embed_images(towers, images_of_captions, EncodeOptions())
        @ embed_texts(towers, captions, "document", EncodeOptions()).T
    )
    assert (similarity.argmax(axis=1) == np.arange(len(captions))).mean() > 0.3


@pytest.mark.parametrize(("stop_at", "how"), [(4, "signal"), (7, "kill")])
@pytest.mark.parametrize("image", [{}, {"patch_dropout": 0.5, "flip": True}, {"lock": "image"}], ids=str)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    how: str,
    image: dict[str, Any],
) -> None:
    tower = dataclasses.replace(config.model.image, **image)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image=tower))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    # The number of workers must not matter, either.
    train(dataclasses.replace(whole, data=dataclasses.replace(config.data, workers=2 if stop_at == 4 else 0)))

    class Killed(Exception):
        pass

    step = TrainStep.__call__

    def interrupted(self: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        if number == stop_at:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        with pytest.raises(Killed if how == "kill" else Interrupted):
            train(config)
    torch.rand(5)
    Trainer.resume(Path(config.out), Terminal()).train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))


def test_memory_is_planned_for_each_tower(config: TrainConfig) -> None:
    image = dataclasses.replace(config.model.image, lock="image")
    model = dataclasses.replace(config.model, image=image)
    trainer = Trainer.start(dataclasses.replace(config, model=model, micro_batch_tokens=None), Terminal())
    _, texts = next(iter(trainer.batches.loader())).groups
    # One micro-batch with more features than the texts have tokens, which still needs less memory.
    features = ImageInputs(torch.randn(1000, 128).half(), 1, [np.arange(1000)])
    batch = PreparedBatch([features, texts], 1000, None, padded=True)
    planned = plan_step(
        *(trainer.config, trainer.towers, trainer.loss, trainer.optimizer, trainer.graphs, batch),
        precision="fp32",
        ranks=1,
        batches_waiting=1,
    )
    held = [
        sum(
            measure_graph_bytes(trainer.towers, "fp32", partial(group.embed, trainer.towers, rows))
            for rows in group.micro_batches
        )
        for group in batch.groups
    ]
    assert held[1] > 0.3 * held[0] > 0
    kept = next(size for name, size in planned.step.items() if name.startswith("graphs kept"))
    assert kept == pytest.approx(sum(held), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("image", [{}, {"patch_dropout": 0.5}, {"lock": "image"}], ids=str)
def test_a_step_on_images_does_not_synchronize(config: TrainConfig, image: dict[str, Any]) -> None:
    model = dataclasses.replace(config.model, image=dataclasses.replace(config.model.image, **image))
    trainer = Trainer.start(
        dataclasses.replace(config, model=model, device="cuda", precision="bf16", micro_batch_tokens=200), Terminal()
    )
    batch = next(iter(trainer.batches.loader()))
    for step in range(2):
        trainer.train_step(batch, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = trainer.train_step(batch, 2).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("lock", ["none", "image", "text"])
def test_training_on_images_learns_on_a_gpu(config: TrainConfig, lock: str) -> None:
    image = dataclasses.replace(config.model.image, lock=lock, augment=False)
    model = dataclasses.replace(config.model, dropout=0.0, image=image)
    config = dataclasses.replace(config, model=model, device="cuda", precision="bf16", epochs=40)
    train(config)
    found = losses(config)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


@pytest.mark.parametrize("tower", ["tiny", "tiny-resnet"])
def test_the_gradient_cache_gives_the_gradients_of_the_whole_batch(config: TrainConfig, tower: str) -> None:
    image = dataclasses.replace(config.model.image, name=tower)
    model = dataclasses.replace(config.model, dropout=0.0, image=image)
    trainer = Trainer.start(dataclasses.replace(config, model=model, micro_batch_tokens=17), Terminal())
    batch = next(iter(trainer.batches.loader()))
    images = batch.groups[0]
    assert isinstance(images, ImageInputs) and images.pixels.dtype == torch.uint8 and len(images.micro_batches) == 16
    micro_batches = [MicroBatch(group, rows) for group in batch.groups for rows in group.micro_batches]
    gradients = []
    for keep in (0, 5, len(micro_batches)):
        trainer.towers.zero_grad()
        grad_cache.backward(
            lambda micro: micro.group.embed(trainer.towers, micro.rows),
            micro_batches,
            lambda embeddings: trainer.loss(*batch.merge_embeddings(embeddings, torch.device("cpu"))),
            torch.device("cpu"),
            keep=keep,
        )
        gradients.append({name: p.grad for name, p in trainer.towers.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-4, msg=name)


# Without a projection, as in LiT, the image tower has no trained weights.
@pytest.mark.parametrize("projection", [16, None])
def test_a_locked_image_tower_keeps_its_weights_and_its_cached_features_are_exact(
    projection: int | None, config: TrainConfig, data_folder: Path
) -> None:
    image = ImageConfig(name="tiny", size=32, lock="image")
    locked = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image, projection=projection))
    torch.manual_seed(config.seed)
    before = build_image_text_towers(locked.model).image_fingerprint()
    trainer = Trainer.start(locked, Terminal())
    assert trainer.towers.image_fingerprint() == before
    batch = next(iter(trainer.batches.loader()))
    assert batch.groups[0].pixels.dtype == torch.float16 and batch.groups[0].pixels.shape == (16, 128)
    rows = trainer.batches._schedule.rows(0)[1]
    source = trainer.batches._readers[0].source
    pixels = torch.stack([trainer.towers.transform.pixels(source.read(row).open()) for row in rows])
    with torch.no_grad():
        direct = trainer.towers.eval()({"pixels": pixels})
        cached = batch.groups[0].embed(trainer.towers, np.arange(16))
    torch.testing.assert_close(cached, direct, atol=2e-3, rtol=0)
    trainer.train()
    assert trainer.towers.image_fingerprint() == before
    stores = list((Path(locked.out) / "cache" / "features").glob("*.npy"))
    assert len(stores) == 1
    modified = stores[0].stat().st_mtime_ns
    Trainer.resume(Path(locked.out), Terminal())
    assert stores[0].stat().st_mtime_ns == modified


def test_texts_keep_their_embeddings_if_images_are_projected_into_their_space(config: TrainConfig) -> None:
    image = dataclasses.replace(config.model.image, lock="text", into_text_space=True)
    model = dataclasses.replace(config.model, image=image, projection=None)
    into = dataclasses.replace(config, model=model, epochs=8, optim=OptimConfig(lr=3e-3))
    trainer = Trainer.start(into, Terminal())
    before = embed_texts(trainer.towers.eval(), ["a red square", "circle"], "query", EncodeOptions())
    trained = load_image_text_towers(str(trainer.train()))
    assert np.array_equal(embed_texts(trained, ["a red square", "circle"], "query", EncodeOptions()), before)
    found = losses(into)
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.05


def test_a_locked_text_tower_keeps_its_weights_while_others_are_trained(config: TrainConfig) -> None:
    image = dataclasses.replace(config.model.image, lock="text")
    locked = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image), steps=3)
    trainer = Trainer.start(locked, Terminal())
    before = {name: tensor.clone() for name, tensor in trainer.towers.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in trainer.towers.state_dict().items() if not torch.equal(tensor, before[name])}
    texts = {name for name in before if ".text.0." in name}
    assert texts and not texts & changed
    assert any(".text.2." in name for name in changed), "its projection learns"
    assert any(".image.0." in name for name in changed) and any(".image.1." in name for name in changed)


def test_gradient_checkpointing_does_not_change_the_run(config: TrainConfig, tmp_path: Path) -> None:
    image = dataclasses.replace(config.model.image, patch_dropout=0.5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image), steps=3)
    passes: dict[bool, list[int]] = {}
    for recomputes in (False, True):
        run = dataclasses.replace(config, out=str(tmp_path / str(recomputes)), gradient_checkpointing=recomputes)
        trainer = Trainer.start(run, Terminal())
        calls = passes[recomputes] = []
        for encoder in trainer.towers.encoders:
            layers = max((m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
            linear = next(part for part in layers[0].modules() if isinstance(part, torch.nn.Linear))
            linear.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
    assert len(passes[True]) > len(passes[False])
    np.testing.assert_allclose(
        losses(dataclasses.replace(config, out=str(tmp_path / "True"))),
        losses(dataclasses.replace(config, out=str(tmp_path / "False"))),
        rtol=1e-5,
    )


def test_the_number_of_processes_does_not_change_training(
    python: LoadedPython, config: TrainConfig, data_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0),
        # Adam divides by the magnitude of a gradient, and some gradients are rounding errors.
        optim=OptimConfig(lr=1e-3, eps=1e-3),
        dev=DevConfig(path=str(data_folder / "dev"), split="test", every=3),
        steps=5,
        device="cpu",
    )
    save_config(config, tmp_path / "run.yaml")
    done = python.run(Path(__file__).parents[1] / "images_on_ranks.py", tmp_path / "run.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["pixels", "features"]
