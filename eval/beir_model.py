"""A trained model for the beir package, whose own wrapper knows neither towers nor which prompt is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from index.passages import Passage


class BeirModel:
    """What beir's DenseRetrievalExactSearch asks for, by a sentence-transformers model.

    beir's SentenceBERT calls `encode` for both sides, which leaves out prompts and, of two towers, takes one for all.

    Args:
        model: has `encode_query` and `encode_document`, as SentenceTransformer does.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode_queries(self, queries: list[str], batch_size: int = 16, **options: Any) -> Any:
        """Vectors [M, D] of queries; `options` are those of `encode`."""
        return self._model.encode_query(queries, batch_size=batch_size, **options)

    def encode_corpus(self, corpus: Sequence[Mapping[str, str]], batch_size: int = 8, **options: Any) -> Any:
        """Vectors [N, D] of passages, each with `text` and perhaps `title`."""
        texts = [Passage("", passage.get("title") or "", passage["text"]).content for passage in corpus]
        return self._model.encode_document(texts, batch_size=batch_size, **options)
