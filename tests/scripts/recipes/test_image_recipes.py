"""The image–text recipes have the published values, and runs of them start."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from retriever.cli.terminal import Terminal
from retriever.config.images import ImageConfig
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import load_config, save_config
from retriever.data.images.tars import expand_braces
from retriever.training.optimization.optim import lr_factor
from retriever.training.trainer import Trainer
from scripts import ROOT

sys.path.insert(0, str(Path(__file__).parents[2] / "retriever"))

from cli_helpers import command
from image_helpers import SMALL, letter_tokenizer, save_vision_encoder, write_shards

FOLDER = ROOT / "scripts" / "recipes"
PAIRS = {"cc3m": (3_318_333, 332, 16384), "cc12m": (12_423_374, 1243, 32768), "laion400m": (413_871_335, 41408, 262144)}
TRAINED = ["cc3m_vit-b32", "laion400m_lit-b16"]
RECIPES = ["cc3m_vit-b32", "cc12m_vit-b32", "laion400m_vit-b32", "laion400m_lit-b16", "laion400m_lit-l16"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    pairs, shards, batch = PAIRS[name.partition("_")[0]]
    (source,) = config.data.images
    assert len(expand_braces(source.path)) == shards and config.batch_size == batch
    optim, loss, image = config.optim, config.loss, config.model.image
    locked = "_lit-" in name
    # The scripts of https://github.com/DAMO-NLP-SG/Inf-CLIP that the recipes name.
    expected = ("adafactor", 1e-3, (0.9, 0.95), 1e-4, 1.0) if locked else ("adamw", 5e-4, (0.9, 0.98), 0.5, None)
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay, optim.max_grad_norm) == expected
    assert optim.schedule == "cosine" and (locked or optim.eps == 1e-8)
    assert image.lock == ("image" if locked else "none") and image.augment and not image.flip
    assert loss.name == "inf_cl" and loss.symmetric and loss.learn_logit_scale
    # The learning rate peaks after half an epoch.
    steps = config.epochs * pairs // batch
    factors = [lr_factor(step, int(steps), optim) for step in range(int(steps))]
    assert config.epochs == (8 if name.startswith("laion400m") else 40)
    assert abs(int(np.argmax(factors)) + 1 - 0.5 * pairs / batch) <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_and_one_of_each_kind_trains(name: str, tmp_path: Path) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    lock = config.model.image.lock
    encoder = "tiny" if lock == "none" else str(save_vision_encoder("vit", tmp_path / "encoder"))
    small: TrainConfig = dataclasses.replace(
        config,
        out=str(tmp_path / "run"),
        model=dataclasses.replace(
            config.model,
            architecture={**(config.model.architecture or {}), **SMALL},
            tokenizer=str(tmp_path / "tokenizer"),
            max_length=16,
            image=ImageConfig(name=encoder, lock=lock),
        ),
        data=dataclasses.replace(
            config.data,
            images=(dataclasses.replace(config.data.images[0], path=write_shards(tmp_path / "set")),),
            workers=0,
        ),
        batch_size=16,
        steps=2,
        precision="fp32",
    )
    save_config(small, tmp_path / "small.yaml")
    outcome = command("train", tmp_path / "small.yaml", "--dry-run", "--processes", 8)
    assert outcome.code == 0 and "peak" in outcome.out, outcome.err
    # Planning does not encode images.
    assert not list((tmp_path / "run" / "cache").glob("features/*"))
    if name not in TRAINED:
        return
    trainer = Trainer.start(small, Terminal())
    assert (trainer.train() / "modules.json").exists() and trainer.state.step == 2


def test_a_plan_has_the_size_of_the_recipes_towers(tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--data.images.0.path", write_shards(tmp_path / "set"), "--data.workers", 0, "--batch-size", 16]
    flags += ["--model.tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run"]
    outcome = command("train", FOLDER / "cc3m_vit-b32.yaml", "--dry-run", "--processes", 8, *flags)
    assert outcome.code == 0, outcome.err
    [weights] = re.findall(r"^ *weights +(\d+) MiB$", outcome.out, re.M)
    # ViT-B/32, twelve layers of width 512, and a projection of each to 512, in fp32; letters add nothing.
    millions = 87.46 + 12 * 12 * 512**2 / 1e6 + (768 + 512) * 512 / 1e6
    assert int(weights) == pytest.approx(millions * 4e6 / 2**20, rel=0.01)


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe: Path) -> None:
    data = load_config(recipe).data
    assert data.sources or data.images
