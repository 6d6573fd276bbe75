"""Passages of a store and of a corpus are read in batches, none of which may lose a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.data.known_positives import text_digests
from retriever.data.stored import texts
from retriever.training.objective import embedded_texts

TEXTS = [f"text {n}" for n in range(10)]


def test_every_text_of_a_store_is_found_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BATCH_ROWS", 3)
    with EmbeddingWriter(tmp_path / "store", dim=2, model={"sha256": "0"}, source={}) as writer:
        writer.append([Passage(f"id{n}", "", text) for n, text in enumerate(TEXTS)], np.eye(10, 2, dtype=np.float32))
    found = texts.open_stored_texts(EmbeddingStore.open(tmp_path / "store"), tmp_path / "cache")
    assert found.first(text_digests(TEXTS)).tolist() == list(range(10))
    assert found.first(text_digests([f"id{n}" for n in range(10)])).tolist() == list(range(10))


def test_every_text_of_a_corpus_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_texts, "BATCH_ROWS", 3)
    corpus: Any = TEXTS
    assert [passage.text for passage in embedded_texts.UniqueTexts([], corpus, "passages")] == TEXTS
