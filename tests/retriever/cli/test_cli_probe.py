"""`retriever evaluate probe`: from a model and labeled images to a report, in folders and tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import assert_refused, command
from image_helpers import draw, save_checkpoint

import retriever

COLORS, SHAPES = ("red", "green", "blue"), ("square", "circle")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    save_checkpoint("clip", folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """SET/{train,test}/COLOR/N.png: three images of each color for training, two to test."""
    for split, count in (("train", 3), ("test", 2)):
        for color in COLORS:
            (tmp_path / "set" / split / color).mkdir(parents=True)
            for number in range(count):
                image = draw(color, SHAPES[number % 2]).resize((64 + number, 64))
                image.save(tmp_path / "set" / split / color / f"{number}.png")
    return tmp_path / "set"


def test_both_splits_of_a_set_are_embedded_and_scored(clip: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "probe", "--model", clip, "--data", data, "--out", tmp_path / "out", "--neighbors", 3]
    done = command(*words)
    assert done.code == 0, done.err
    assert "| acc1 " in done.out and "regularization of the linear probe: " in done.out
    report: dict[str, Any] = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert report["images"] == {"train": 9, "test": 6} and report["classes"] == 3
    assert set(report["chance"]) == {"acc1", "mean_per_class_recall"}
    assert len(report["linear probe"]["held-out acc1"]) == 10 and report["nearest neighbors"]["neighbors"] == 3
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/images/*/*.npy")}
    again = command(*words, "--json")
    assert len(shards) == 2 and {path: path.stat().st_mtime_ns for path in shards} == shards
    assert json.loads(again.out) == report
    found = retriever.probe(clip, data, neighbors=3, device="cpu")
    assert found.metrics == {name: report[name]["measures"] for name in ("nearest neighbors", "linear probe")}
    # Colors, of which even random weights make different embeddings.
    assert found.metrics["nearest neighbors"]["acc1"] > 0.8


def test_tables_are_two_sets(clip: Path, data: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["picture", "color"])
            for path in sorted((data / split).rglob("*.png")):
                rows.writerow([path.relative_to(tmp_path), path.parent.name])
    words = ["evaluate", "probe", "--model", clip, "--data", tmp_path / "test.csv", "--out", tmp_path / "out", "--json"]
    words += ["--image", "picture", "--label", "color"]
    assert_refused(command(*words), 1, "expected test images apart from the training images, found the same")
    done = command(*words, "--train", tmp_path / "train.csv", "--regularization", 10)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["linear probe"]["regularization"] == 10 and report["linear probe"]["held-out acc1"] == {}
    assert report["images"] == {"train": 9, "test": 6}


def test_what_cannot_be_probed_is_refused(clip: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "probe", "--model", clip, "--data", data, "--out", tmp_path / "out"]
    assert_refused(command(*words, "--regularization", 0), 2, "--regularization: expected a number over 0, found 0")
    assert_refused(command(*words, "--neighbors", 0), 2, "--neighbors: expected at least 1, found 0")
    (data / "test" / "yellow").mkdir()
    draw("red", "square").save(data / "test" / "yellow" / "0.png")
    assert_refused(command(*words), 1, "expected a class of the training images, found 'yellow'")
