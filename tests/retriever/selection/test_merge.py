"""Merged models: their weights, their folder, the search on a dev set, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import command, write_beir
from image_helpers import COLORS, SHAPES, draw, save_checkpoint

import retriever
from retriever.config.model import ModelConfig
from retriever.models.images.towers import load_image_text_towers
from retriever.models.loading.checksums import write_checksums
from retriever.models.modality import build_towers
from retriever.selection.weights import interpolate


@pytest.fixture(scope="module")
def models(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of one architecture."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("model") / f"m{seed}"
        folder.mkdir()
        build_towers(tiny).save(folder)
        write_checksums(folder)
        folders.append(str(folder))
    return folders


def weight(folder: str | Path) -> torch.Tensor:
    return retriever.load(folder).towers.encoders[0].embeddings.word_embeddings.weight.detach()


def test_slerp_follows_the_great_circle() -> None:
    angle = 0.8
    a, b = torch.tensor([3.0, 0.0]), 3 * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    found = interpolate({"w": a}, {"w": b}, 0.25, "slerp")["w"]
    torch.testing.assert_close(found, 3 * torch.tensor([np.cos(angle / 4), np.sin(angle / 4)], dtype=torch.float32))
    parallel = interpolate({"w": a, "n": torch.tensor(3)}, {"w": 2 * a, "n": torch.tensor(3)}, 0.25, "slerp")
    torch.testing.assert_close(parallel["w"], 1.25 * a)
    zero = torch.zeros(2)
    torch.testing.assert_close(interpolate({"w": zero}, {"w": b}, 0.5, "slerp")["w"], b / 2)


def test_a_merged_model_is_an_ordinary_folder_with_its_sources(models: list[str], tmp_path: Path) -> None:
    merged = retriever.merge(models, tmp_path / "merged", weights=[1, 2, 1])
    mean = 0.25 * weight(models[0]) + 0.5 * weight(models[1]) + 0.25 * weight(models[2])
    torch.testing.assert_close(weight(merged.folder), mean)
    assert list(merged.weights.values()) == [0.25, 0.5, 0.25] and merged.score is None
    record = json.loads((merged.folder / "merge.json").read_text())
    fingerprints = [retriever.load(name).towers.fingerprint()["sha256"] for name in models]
    assert [(row["model"], row["sha256"]) for row in record["sources"]] == list(zip(models, fingerprints, strict=True))
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(str(merged.folder), device="cpu").encode(["a text"])
    np.testing.assert_allclose(merged.model.encode_queries(["a text"]), vectors, atol=1e-5)
    card = (merged.folder / "README.md").read_text()
    assert "merge (linear)" in card and "(0.500)" in card and str(Path(models[0]).parent) not in card
    # All the weight on one model gives this model, and a merged model may be replaced.
    again = retriever.merge(models, merged.folder, weights=[0, 1, 0], method="slerp")
    assert torch.equal(weight(again.folder), weight(models[1]))


def test_the_search_keeps_the_best_merge(models: list[str], tmp_path: Path) -> None:
    data = write_beir(tmp_path / "words")
    outcome = command(
        *("merge", "--models", *models[:2], "--out", tmp_path / "merged", "--dev", data, "--grid", "4", "--json")
    )
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    rows = record["candidates"]
    assert [round(min(row["weights"].values()), 2) for row in rows[2:]] in ([0.25, 0.5, 0.25],) and len(rows) == 5
    best = max(rows, key=lambda row: row["ndcg@10"])
    assert answer["nDCG@10"] == round(best["ndcg@10"], 4)
    assert {name: share for name, share in answer["weights"].items() if share} == best["weights"]
    measured = retriever.evaluate(tmp_path / "merged", data, split="dev").metrics["ndcg@10"]
    assert measured == pytest.approx(best["ndcg@10"], abs=1e-9)
    assert f"| {best['ndcg@10']:.4f} |" in (tmp_path / "merged" / "merge.md").read_text()


def test_models_of_images_and_texts_are_merged_with_a_search(tmp_path: Path) -> None:
    save_checkpoint("clip", tmp_path / "one")
    other = load_image_text_towers(str(tmp_path / "one"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    (tmp_path / "two").mkdir()
    other.save(tmp_path / "two")
    for color in COLORS[:3]:
        (tmp_path / "set" / "test" / color).mkdir(parents=True)
        draw(color, SHAPES[0]).save(tmp_path / "set" / "test" / color / "image.png")
    models = [tmp_path / "one", tmp_path / "two"]
    merged = retriever.merge(models, tmp_path / "merged", dev=tmp_path / "set", split="test", grid=2)
    assert merged.metric == "acc1" and len(merged.candidates) == 3
    assert merged.score == max(row["acc1"] for row in merged.candidates)
    half = retriever.merge(models, tmp_path / "merged", weights=[1, 1]).model.towers.state_dict()
    name = next(name for name in half if name.endswith("patch_embedding.weight"))
    first = load_image_text_towers(str(tmp_path / "one")).state_dict()[name]
    torch.testing.assert_close(half[name], 0.75 * first)


def test_what_cannot_be_merged_is_refused_by_name(models: list[str], tiny: ModelConfig, tmp_path: Path) -> None:
    wide, deep = tmp_path / "wide", tmp_path / "cls"
    for folder, config in (
        (wide, dataclasses.replace(tiny, architecture={**(tiny.architecture or {}), "intermediate_size": 96})),
        (deep, dataclasses.replace(tiny, pooling="cls")),
    ):
        folder.mkdir()
        build_towers(config).save(folder)
    with pytest.raises(
        retriever.InputError, match=r"wide: cannot be merged with .*: intermediate_size: expected 64, found 96"
    ):
        retriever.merge([models[0], wide], tmp_path / "out")
    with pytest.raises(retriever.InputError, match=r"cls: cannot be merged with .*: modules: expected .*mean"):
        retriever.merge([models[0], deep], tmp_path / "out")
    for arguments, message in (
        ({"models": models[:1]}, "models: expected two or more models, found 1"),
        ({"models": [models[0]] * 2}, "models: expected different models"),
        ({"models": models, "weights": [1, 2]}, "weights: expected 3, one for each model, found 2"),
        ({"models": models, "weights": [1, 2, -1]}, "weights: expected numbers of 0 or more"),
        ({"models": models, "weights": [1, 2, 1], "dev": "x"}, "weights: expected none with dev"),
        ({"models": models, "method": "mean"}, "method: expected one of linear, slerp"),
    ):
        with pytest.raises(retriever.ConfigError, match=message):
            retriever.merge(**{"out": tmp_path / "out", **arguments})
    with pytest.raises(retriever.ConfigError, match="out: expected a new or empty folder"):
        retriever.merge(models, models[0])
    assert not (tmp_path / "out").exists()
