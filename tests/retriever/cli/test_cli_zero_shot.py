"""`retriever evaluate zero-shot`: from a model folder and image sets to a report, whose numbers are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import assert_refused, command, write_lines
from image_helpers import draw, save_checkpoint

COLORS, SHAPES = ("red", "green", "blue"), ("square", "circle")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A whole CLIP checkpoint of transformers with random weights, its processor, its folder."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    found = save_checkpoint("clip", folder)
    return found[0], found[1], folder


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of images by color, and a table of the same images with two captions each."""
    rows: list[object] = []
    for color in COLORS:
        (tmp_path / "colors" / color).mkdir(parents=True)
        for shape in SHAPES:
            file = Path("colors") / color / f"{shape}.png"
            draw(color, shape).save(tmp_path / file)
            rows.append({"image": str(file), "captions": [f"a {color} {shape}", f"{shape} in {color}"]})
    return tmp_path / "colors", write_lines(tmp_path / "captions.jsonl", rows)


def test_a_report_is_written_and_used_again(clip: Any, sets: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["evaluate", "zero-shot", "--model", clip[2], "--data", *sets, "--out", tmp_path / "report"]
    first = command(*words)
    assert first.code == 0, first.err
    assert "| acc1 | " in first.out and "| image retrieval recall@5 | " in first.out and "0.3333" in first.out
    for name in ("report.json", "report.md", "report.html", "colors/nearest.png", "colors/confusion.png"):
        assert (tmp_path / "report" / name).is_file()
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("report/*/images/*.npy")}
    assert len(shards) == 2
    again = command(*words, "--json")
    values = json.loads(again.out)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    for found in (values, written):
        for one in found["sets"].values():
            del one["seconds"]
    assert values == written
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert values["details"]["model sha256"] and set(values["details"]["data sha256"]) == {"colors", "captions"}


def test_predictions_are_those_of_transformers(clip: Any, sets: tuple[Path, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a picture of {c}\n{c} all over\n")
    words = ["--model", clip[2], "--data", sets[0], "--templates", prompts, "--out", tmp_path / "report", "--json"]
    found = json.loads(command("evaluate", "zero-shot", *words).out)["sets"]["colors"]
    assert found["templates"] == ["a picture of {c}", "{c} all over"]

    from retriever.encoding.encoder import EncodeOptions, embed_texts
    from retriever.encoding.image_encoder import embed_images
    from retriever.models.images.towers import load_image_text_towers

    towers = load_image_text_towers(str(clip[2]))
    names = sorted(COLORS)
    texts = torch.from_numpy(
        embed_texts(
            towers, [t.replace("{c}", n) for n in names for t in found["templates"]], "document", EncodeOptions()
        )
    )
    classes = torch.nn.functional.normalize(texts.view(3, 2, -1).mean(1), dim=-1)
    files = [file for name in names for file in sorted((sets[0] / name).iterdir())]
    scores = torch.from_numpy(embed_images(towers, files, EncodeOptions())) @ classes.T
    labels = np.repeat(np.arange(3), 2)
    assert found["measures"]["acc1"] == pytest.approx((scores.argmax(1).numpy() == labels).mean())


def test_broken_images_are_named_and_left_out(clip: Any, sets: tuple[Path, Path], tmp_path: Path) -> None:
    (sets[0] / "red" / "bad.jpg").write_bytes(b"no image")
    done = command("evaluate", "zero-shot", "--model", clip[2], "--data", sets[0], "--out", tmp_path / "r")
    assert done.code == 0
    assert "colors: left out: red/bad.jpg: expected an image" in done.err
    found = json.loads((tmp_path / "r" / "report.json").read_text())["sets"]["colors"]
    assert (found["images"], list(found["broken"])) == (6, ["red/bad.jpg"])


def test_several_processes_are_refused(
    clip: Any, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["evaluate", "zero-shot", "--model", clip[2], "--data", sets[0], "--out", tmp_path / "r"]
    assert_refused(command(*words), 2, "works in one process; start it without torchrun")


def test_a_report_is_not_written_into_its_set(clip: Any, sets: tuple[Path, Path]) -> None:
    files = sorted(sets[0].rglob("*"))
    # The last as OUT/SET: OUT/colors is the set.
    for out in (sets[0], sets[0] / "report", sets[0] / ".." / "colors", sets[0].parent):
        done = command("evaluate", "zero-shot", "--model", clip[2], "--data", *sets, "--out", out)
        assert_refused(done, 2, "--out: expected a folder that is not within the set .*colors, found")
    assert sorted(sets[0].rglob("*")) == files


def test_mistakes_are_said_in_one_line(clip: Any, sets: tuple[Path, Path], tmp_path: Path, minilm: str) -> None:
    def refused(*words: object, code: int = 1, pattern: str) -> None:
        assert_refused(command("evaluate", "zero-shot", *words, "--out", tmp_path / "r"), code, pattern)

    refused("--model", clip[2], "--data", code=2, pattern="--data")
    refused("--model", clip[2], "--data", tmp_path / "gone", pattern="gone: no such file or folder")
    refused("--model", clip[2], "--data", sets[0], sets[0], pattern="expected sets of different names")
    refused("--model", minilm, "--data", sets[0], pattern=str(minilm))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("no place\n")
    refused("--model", clip[2], "--data", sets[0], "--templates", prompts, pattern=r"prompts\.txt:1: expected a prompt")
    (tmp_path / "r" / "colors" / "images").mkdir(parents=True)
    (tmp_path / "r" / "colors" / "images" / "mine.txt").write_text("mine")
    refused("--model", clip[2], "--data", sets[0], pattern="expected an empty folder or an embedding store")
