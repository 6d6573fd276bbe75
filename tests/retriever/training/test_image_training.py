"""Training on images and captions: learning, exact resumption, locked towers, sources and broken data."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import LoadedPython
from image_helpers import SMALL, captioned, draw, image_bytes, letter_tokenizer, write_shards, write_tar
from run_helpers import assert_same, results

from index.files import InputError
from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.images import ImageConfig, ImageSource
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import save_config
from retriever.data.images import chunks
from retriever.data.images.batches import ImageInputs
from retriever.data.images.chunks import PairReader
from retriever.data.images.loading import open_image_batches
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.share import Share
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import embed_images
from retriever.errors import ConfigError
from retriever.models.images.towers import build_image_text_towers, load_image_text_towers
from retriever.models.memory import measure_graph_bytes
from retriever.training import grad_cache
from retriever.training.memory_plan import plan_step
from retriever.training.step import MicroBatch, TrainStep
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 32 pairs, the same as a dev set, and a tokenizer."""
    folder = tmp_path_factory.mktemp("images")
    write_shards(folder / "set")
    letter_tokenizer().save_pretrained(folder / "tokenizer")
    members: list[tuple[str, bytes]] = []
    for number, (image, caption) in enumerate(captioned()):
        members += [(f"{number}.png", image_bytes(image)), (f"{number}.txt", caption.encode())]
    write_tar(folder / "dev" / "test" / "0.tar", members)
    (folder / "dev" / "dataset_type.txt").write_text("retrieval\n")
    return folder


@pytest.fixture
def config(data_folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=ModelConfig(
            architecture={"model_type": "bert", **SMALL, "max_position_embeddings": 16},
            tokenizer=str(data_folder / "tokenizer"),
            projection=16,
            image=ImageConfig(name="tiny", size=32),
        ),
        data=DataConfig(
            images=(ImageSource(str(data_folder / "set" / "{000..001}.tar"), caption=("json:captions",)),), workers=0
        ),
        loss=LossConfig(learn_logit_scale=True, symmetric=True),
        optim=OptimConfig(lr=1e-3),
        batch_size=16,
        epochs=4,
        micro_batch_tokens=100,
        log_every=1,
        checkpoint_every=3,
        precision="fp32",
    )


def train(config: TrainConfig) -> Path:
    return Trainer.start(config, Terminal()).train()


def losses(config: TrainConfig) -> list[float]:
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


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


def test_the_gradient_cache_gives_the_gradients_of_the_whole_batch(config: TrainConfig) -> None:
    model = dataclasses.replace(config.model, dropout=0.0)
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


@pytest.mark.parametrize("lock", ["none", "image"])
def test_the_number_of_workers_does_not_change_batches(
    config: TrainConfig, lock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More chunks than the shared memory of the workers holds.
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", 3)
    image = dataclasses.replace(config.model.image, lock=lock)
    batches = Trainer.start(
        dataclasses.replace(config, model=dataclasses.replace(config.model, image=image)), Terminal()
    ).batches
    # All batches are kept until the end: their memory must not be reused.
    alone, shared = list(batches.loader(start=1)), list(batches.loader(start=1, workers=3))
    assert len(alone) == len(shared) == 7
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.groups[0].pixels, other.groups[0].pixels)
        assert one.groups[1].tokens.ids.tolist() == other.groups[1].tokens.ids.tolist()
    assert len({tuple(batch.groups[0].pixels.flatten().tolist()) for batch in alone}) == 7
    # Reused memory has the same content.
    for one, pixels in zip(alone, (batch.groups[0].pixels.clone() for batch in batches.loader(start=1)), strict=True):
        assert torch.equal(one.groups[0].pixels, pixels)


def test_sources_are_sampled_by_weight_and_ranks_read_only_their_shares(
    config: TrainConfig, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (str(data_folder / "set" / f"{number:03}.tar") for number in range(2))
    sources = (ImageSource(first, weight=3), ImageSource(second, weight=1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, images=sources), steps=8)
    whole = Trainer.start(config, Terminal())
    tars = [pairs.samples.shards[0].name for pairs in (reader.source for reader in whole.batches._readers)]
    sources_of_steps = [tars[whole.batches._schedule.rows(step)[0]] for step in range(8)]
    assert tars == ["000.tar", "001.tar"] and sources_of_steps.count("000.tar") == 6
    read: list[int] = []
    call = PairReader.__call__
    monkeypatch.setattr(
        PairReader, "__call__", lambda self, rows, *rest: (read.extend(rows), call(self, rows, *rest))[1]
    )
    shares = []
    for rank in range(3):
        read.clear()
        batches, _ = open_image_batches(
            whole.config,
            whole.towers,
            Path(config.out) / "cache",
            precision="fp32",
            token_budget=100,
            reporter=Terminal(),
            share=Share(rank, 3),
        )
        shares.append(list(batches.loader()))
        # 16 pairs per batch, 8 batches.
        assert len(read) == 8 * len(Share(rank, 3).of(16))
    for step, batch in enumerate(whole.batches.loader()):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part.groups[0].pixels for part in parts]), batch.groups[0].pixels)
        assert (
            np.concatenate([part.groups[1].tokens.ids for part in parts]).tolist()
            == batch.groups[1].tokens.ids.tolist()
        )


def test_a_source_smaller_than_a_batch_gives_all_its_pairs(
    config: TrainConfig, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last chunks of its batches are then empty.
    monkeypatch.setattr(chunks, "CHUNK_PAIRS", 3)
    few = dataclasses.replace(config.data.images[0], path=str(data_folder / "set" / "000.tar"))
    data = dataclasses.replace(config.data, images=(config.data.images[0], few))
    trainer = Trainer.start(dataclasses.replace(config, data=data, batch_size=21, epochs=1, steps=6), Terminal())
    schedule = trainer.batches.schedule
    expected = [(21, 16)[schedule.rows(step)[0]] for step in range(6)]
    assert sorted(set(expected)) == [16, 21]
    for workers in (0, 2):
        assert [batch.queries for batch in trainer.batches.loader(workers=workers)] == expected
    assert "21 queries" in trainer.plan().lines()[0]
    trainer.train()


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


def test_broken_pairs_are_skipped_and_too_many_stop_the_run(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(160):
        content = image_bytes(draw("red", "circle")) if number < 40 else b"broken"
        members += [(f"{number}.png", content), (f"{number}.txt", f"text {number}".encode())]
    source = ImageSource(str(write_tar(tmp_path / "broken.tar", members)), max_broken=0.9)
    for lock in ("none", "image"):
        allowed = dataclasses.replace(
            config,
            out=str(tmp_path / lock),
            data=dataclasses.replace(config.data, images=(source,)),
            model=dataclasses.replace(config.model, image=dataclasses.replace(config.model.image, lock=lock)),
            batch_size=32,
            epochs=1,
        )
        train(allowed)
        lines = [line for line in capsys.readouterr().err.splitlines() if "pair left out" in line]
        assert len(losses(allowed)) == 5
        assert len(lines) == 10 + 3 and "number 64 of" in lines[-1] and "broken.tar: " in lines[0]
    strict = dataclasses.replace(
        allowed,
        out=str(tmp_path / "strict"),
        data=dataclasses.replace(allowed.data, images=(ImageSource(source.path),)),
    )
    with pytest.raises(InputError, match=r"broken\.tar: \d+ of 1\d\d pairs are broken, more than max_broken \(0\.01\)"):
        train(strict)


def test_an_error_in_a_worker_ends_the_run_and_all_processes(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_shards(tmp_path / "cut", 1)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, images=(ImageSource(pattern),), workers=1),
        micro_batch_tokens=None,
    )
    trainer = Trainer.start(config, Terminal())
    before = multiprocessing.active_children()
    with pytest.raises(RecursionError) as caught, monkeypatch.context() as patch:
        patch.setattr(PairReader, "__call__", lambda *_: (_ for _ in ()).throw(RecursionError("deep")))
        trainer.train()
    # Even while the traceback references the loader.
    assert caught.tb is not None and multiprocessing.active_children() == before
    path = tmp_path / "cut" / "000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"^\S*000\.tar: expected \d+ bytes at \d+, found \d+$"):
        trainer.train()
    assert multiprocessing.active_children() == before


def test_data_and_model_must_fit_together(config: TrainConfig, data_folder: Path) -> None:
    texts = dataclasses.replace(config, model=dataclasses.replace(config.model, image=ImageConfig()))
    with pytest.raises(ConfigError, match=r"data\.images: \w+ need an image tower"):
        Trainer.start(texts, Terminal())
    with pytest.raises(ConfigError, match=r"expected data\.images"):
        Trainer.start(dataclasses.replace(config, data=DataConfig()), Terminal())
