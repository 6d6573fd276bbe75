"""Features of a locked image tower are computed once, go on after a kill, and belong to the pictures that lie there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import draw, image_bytes, save_checkpoint, write_tar

import retriever.data.images.features as features
from retriever.config.images import ImageSource
from retriever.data.images.features import FeatureStore, compute_features
from retriever.data.images.sources import BrokenPairError, PairSource, open_pairs
from retriever.models.images.towers import ImageTextTowers, load_image_text_towers


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> ImageTextTowers:
    folder = tmp_path_factory.mktemp("clip") / "model"
    save_checkpoint("clip", folder)
    return load_image_text_towers(str(folder))


@pytest.fixture
def pairs(tmp_path: Path) -> PairSource:
    """Twelve pairs, the sixth of which has a broken picture."""
    members = []
    for number in range(12):
        picture = b"broken" if number == 5 else image_bytes(draw(("red", "green", "blue")[number % 3], "circle"))
        members += [(f"{number:02}.png", picture), (f"{number:02}.txt", b"words")]
    return open_pairs(ImageSource(str(write_tar(tmp_path / "a.tar", members))), tmp_path / "index")


def test_a_killed_computation_goes_on_and_ends_as_one_that_was_not(
    towers: ImageTextTowers, pairs: PairSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compute_features(towers, pairs, tmp_path / "whole", "fp32", at_once=2)
    monkeypatch.setattr(features, "_NOTED", 4)
    passed: list[int] = []

    def stopping(count: int) -> None:
        passed.append(count)
        if sum(passed) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_features(towers, pairs, tmp_path / "cut", "fp32", at_once=2, progress=stopping)
    passed.clear()
    cut = compute_features(towers, pairs, tmp_path / "cut", "fp32", at_once=2, progress=passed.append)
    assert passed == [4, 2, 2, 2, 2]
    assert np.array_equal(np.load(whole.path), np.load(cut.path), equal_nan=True)
    passed.clear()
    compute_features(towers, pairs, tmp_path / "cut", "fp32", at_once=2, progress=passed.append)
    assert passed == [12]


def test_features_are_those_of_the_encoder_and_a_broken_picture_has_none(
    towers: ImageTextTowers, pairs: PairSource, tmp_path: Path
) -> None:
    store = compute_features(towers, pairs, tmp_path / "cache", "fp32", at_once=5)
    with torch.inference_mode():
        expected = towers.image_features(towers.transform.pixels(pairs.read(3).open())[None])[0]
    assert torch.allclose(store.read(3, "place").float(), expected, atol=2e-3)
    with pytest.raises(BrokenPairError, match="place: picture that could not be read when features were computed"):
        store.read(5, "place")
    assert len(store) == 12 and not towers.training


def test_a_picture_replaced_under_its_name_is_encoded_anew(towers: ImageTextTowers, tmp_path: Path) -> None:
    rows = [{"image": f"{number}.png", "caption": "words"} for number in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(draw("red", "circle")))

    def computed() -> FeatureStore:
        pairs = open_pairs(ImageSource(str(tmp_path / "pairs.jsonl")), tmp_path / "index")
        return compute_features(towers, pairs, tmp_path / "cache", "fp32", at_once=2)

    first = computed()
    assert computed().path == first.path
    replaced = tmp_path / "1.png"
    replaced.write_bytes(image_bytes(draw("blue", "circle")))
    os.utime(replaced, (1, 1))
    second = computed()
    assert torch.equal(first.read(0, "a"), second.read(0, "a"))
    assert not torch.equal(first.read(1, "b"), second.read(1, "b"))
    (tmp_path / "2.png").write_bytes(image_bytes(draw("green", "cross")))
    assert torch.isfinite(computed().read(2, "c")).all()
