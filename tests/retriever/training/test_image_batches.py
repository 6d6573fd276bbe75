"""Batches of images and captions in training: workers, sources, ranks and broken data."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_helpers import draw, image_bytes, write_shards, write_tar
from image_run_helpers import run_config, train, write_data
from run_helpers import losses

from index.files import InputError
from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.images import ImageConfig, ImageSource
from retriever.config.run import TrainConfig
from retriever.data.images import chunks
from retriever.data.images.chunks import PairReader
from retriever.data.images.loading import open_image_batches
from retriever.distributed.share import Share
from retriever.errors import ConfigError
from retriever.training.trainer import Trainer


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_data(folder)
    return folder


@pytest.fixture
def config(data_folder: Path, tmp_path: Path) -> TrainConfig:
    return run_config(data_folder, tmp_path / "run")


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
