"""`retriever duplicates` and `retriever.near_duplicates` on stores of texts and of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import assert_refused, command
from image_helpers import noise, save_checkpoint

import retriever
from index.files import ConfigError, InputError
from index.passages import Passage
from index.store.writer import EmbeddingWriter


def write_store(folder: Path, vectors: np.ndarray, dtype: str = "float32") -> Path:
    with EmbeddingWriter(folder, dim=vectors.shape[1], model={"sha256": "m"}, source={}, dtype=dtype) as writer:
        writer.append([Passage(f"d{row}", "", "text") for row in range(len(vectors))], vectors)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_groups_are_written_with_scores(dtype: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7], vectors[30] = vectors[3], vectors[12]
    store = write_store(tmp_path / "store", vectors, dtype)
    done = command("duplicates", "--embeddings", store, "--out", tmp_path / "out.jsonl", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"rows": 40, "groups": 2, "redundant": 2, "out": str(tmp_path / "out.jsonl")}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[member["id"] for member in line["members"]] for line in lines] == [["d3", "d7"], ["d12", "d30"]]
    assert lines[0] == {
        "group": 1,
        "members": [{"id": "d3", "nearest": "d7", "score": 1.0}, {"id": "d7", "nearest": "d3", "score": 1.0}],
    }
    found = retriever.near_duplicates(store)
    assert found.redundant == ["d7", "d30"]
    assert repr(found) == "NearDuplicates(groups=2, redundant=2, rows=40)"


def test_images_that_were_saved_twice_are_found(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        noise(64, 64, number).save(images / f"{number}.png")
    noise(64, 64, 2).save(images / "copy.webp", lossless=True)
    save_checkpoint("clip", tmp_path / "clip")
    store = retriever.encode(tmp_path / "clip", images, tmp_path / "store")
    [group] = retriever.near_duplicates(store, threshold=0.9999).groups
    assert [member.id for member in group] == ["2.png", "copy.webp"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", np.eye(3, dtype=np.float32) * [1, 0, 1])
    arguments = ["duplicates", "--embeddings", store, "--out", tmp_path / "out.jsonl"]
    assert_refused(command(*arguments), 1, "row 1, 'd1': expected a vector with a direction, found zeros")
    assert_refused(command(*arguments, "--threshold", 1.5), 2, "--threshold: expected a cosine similarity over 0")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ConfigError, match="threshold"):
        retriever.near_duplicates(store, threshold=0)
    with pytest.raises(InputError, match="expected an embedding store"):
        retriever.near_duplicates(tmp_path / "nothing")
