from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_helpers import MODEL, passages_of

from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EmbeddingStore]:
    """A function that writes `vectors` [N, D] as a store of small shards and opens it."""

    def make(
        vectors: np.ndarray, ids: list[str] | None = None, *, name: str = "emb", shard_rows: int = 7, dtype="float32"
    ) -> EmbeddingStore:
        ids = ids if ids is not None else [f"d{row}" for row in range(len(vectors))]
        folder = tmp_path / name
        header = {"dim": vectors.shape[1], "dtype": dtype, "model": MODEL, "source": {"file": "corpus.jsonl"}}
        with EmbeddingWriter(folder, **header, shard_rows=shard_rows) as writer:
            writer.append(passages_of(ids), vectors)
        return EmbeddingStore.open(folder)

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
