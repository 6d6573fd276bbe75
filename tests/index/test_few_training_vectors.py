"""Few training vectors are reported once, in one line with the numbers; faiss's own warnings are silenced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_helpers import MODEL, passages_of

from index.ann.build import build
from index.ann.settings import core
from index.ann.train import fingerprint, train
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

ROWS = 260


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    folder = tmp_path_factory.mktemp("store") / "emb"
    vectors = np.random.default_rng(0).normal(size=(ROWS, 16)).astype(np.float32)
    with EmbeddingWriter(folder, dim=16, model=MODEL, source={"path": "c", "sha256": "0" * 64}) as writer:
        writer.append(passages_of([f"d{row}" for row in range(ROWS)]), vectors)
    return EmbeddingStore.open(folder)


@pytest.mark.parametrize(
    ("factory", "centroids"),
    [
        ("PQ4x4", 16),
        ("IVF4,PQ2x4", 16),
        ("IVF4,PQ2x4fs", 16),
        ("IVF32,Flat", 32),
        ("PQ2x4fs,RFlat", 16),
        ("IVF4,PQ2x4,Refine(PQ2x4)", 16),
        ("HNSW8_PQ2x4", 16),
        ("OPQ1_4,PQ2x4", 256),
        ("RQ2x4", 16),
        ("IVF4,PRQ2x2x4", 16),
        ("IVF16(PQ2x4),Flat", 16),
    ],
)
def test_few_training_vectors_are_reported_once(
    store: EmbeddingStore, factory: str, centroids: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def made() -> Any:
        return faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)

    notes: list[str] = []
    index, plain = made(), made()
    assert train(index, store, factory, 0, without=np.empty(0, np.int64), note=notes.append) == ROWS
    assert capfd.readouterr() == ("", "")
    assert notes == [
        f"factory '{factory}': trained on {ROWS} vectors; to find {centroids} centroids well takes "
        f"{39 * centroids:,}, 39 for each"
    ]
    # faiss's own warning, and the index it trains on the same vectors.
    if isinstance(core(plain), faiss.IndexIVF):
        core(plain).cp.seed = 0
    plain.train(np.concatenate([np.array(vectors) for _, vectors in store.shards()]))
    assert "please provide at least" in capfd.readouterr().err
    assert fingerprint(index) == fingerprint(plain)


def test_enough_training_vectors_are_not_reported(store: EmbeddingStore, tmp_path: Path) -> None:
    notes: list[str] = []
    build(store, tmp_path / "i", factory="IVF4,Flat", note=notes.append)
    assert notes == ["training"]
    build(store, tmp_path / "i", factory="IVF32,Flat", note=notes.append)
    assert [note for note in notes if note != "training"] == [
        "factory 'IVF32,Flat': trained on 260 vectors; to find 32 centroids well takes 1,248, 39 for each"
    ]


def test_a_rotation_is_left_as_it_was_when_training_fails(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot index"):
        build(store, tmp_path / "i", factory="OPQ1_4,PQ2x10")
