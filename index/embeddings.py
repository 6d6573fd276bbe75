"""Embeddings on disk: `EmbeddingWriter` writes a store of them, `EmbeddingStore` reads it."""

from __future__ import annotations

from index.store import EmbeddingStore
from index.writer import EmbeddingWriter

__all__ = ["EmbeddingStore", "EmbeddingWriter"]
