"""Dev measures of images equal those of `retriever evaluate zero-shot`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import command
from image_helpers import COLORS, SHAPES, draw, save_checkpoint

from index.files import InputError
from retriever.cli.terminal import Terminal
from retriever.config.dev import DevConfig
from retriever.encoding.encoder import EncodeOptions
from retriever.errors import ConfigError
from retriever.models.images.towers import ImageTextTowers, load_image_text_towers
from retriever.training.validation.image_dev_set import ImageDevSet

OPTIONS = EncodeOptions(micro_batch_tokens=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    save_checkpoint("clip", folder)
    return folder


@pytest.fixture(scope="module")
def towers(model: Path) -> ImageTextTowers:
    return load_image_text_towers(str(model))


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A folder of images by color, one of which is broken."""
    for color in COLORS[:3]:
        (tmp_path / "set" / "test" / color).mkdir(parents=True)
        for shape in SHAPES:
            draw(color, shape).save(tmp_path / "set" / "test" / color / f"{shape}.png")
    (tmp_path / "set" / "test" / COLORS[0] / "a.png").write_bytes(b"no image")
    return tmp_path / "set"


def test_measures_equal_those_of_the_command(
    model: Path, towers: ImageTextTowers, colors: Path, tmp_path: Path
) -> None:
    ticks: list[int] = []
    dev = ImageDevSet.open(DevConfig(path=str(colors), split="test"))
    measures = dev.evaluate(towers, OPTIONS, Terminal(), tick=lambda: ticks.append(1))
    words = ["--model", model, "--data", colors, "--out", tmp_path / "report", "--micro-batch-tokens", 16, "--json"]
    found = json.loads(command("evaluate", "zero-shot", *words).out)["sets"]["set"]
    assert dev.metric in measures and measures == pytest.approx(found["measures"])
    # Called between small micro-batches, so that a signal does not wait for all images.
    assert len(ticks) > 6


def test_a_stop_request_ends_the_evaluation(towers: ImageTextTowers, colors: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageDevSet.open(DevConfig(path=str(colors), split="test")).evaluate(towers, OPTIONS, Terminal(), tick=stop)


def test_unsupported_dev_sets_are_refused(towers: ImageTextTowers, colors: Path) -> None:
    with pytest.raises(ConfigError, match=r"dev\.max_queries: expected none"):
        ImageDevSet.open(DevConfig(path=str(colors), split="test", max_queries=5))
    for file in colors.rglob("*.png"):
        file.write_bytes(b"no image")
    dev = ImageDevSet.open(DevConfig(path=str(colors), split="test"))
    with pytest.raises(InputError, match=r"found none that can be read; .*\.png: expected an image"):
        dev.evaluate(towers, OPTIONS, Terminal())
