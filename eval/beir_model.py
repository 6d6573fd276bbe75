"""An adapter that evaluates a trained model with the beir package, using its prompts and both towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from index.passages import Passage


class BeirModel:
    """The model interface of beir's DenseRetrievalExactSearch, for a sentence-transformers model.

    beir's own SentenceBERT calls `encode` for queries and for passages: it ignores prompts and uses one tower for both.

    Args:
        model: an object with `encode_query` and `encode_document`, such as SentenceTransformer.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode_queries(self, queries: list[str], batch_size: int = 16, **options: Any) -> Any:
        """Embed queries as [M, D]; `options` are passed to `encode_query`."""
        return self._model.encode_query(queries, batch_size=batch_size, **options)

    def encode_corpus(self, corpus: Sequence[Mapping[str, str]], batch_size: int = 8, **options: Any) -> Any:
        """Embed passages, each with `text` and an optional `title`, as [N, D]; `options` go to `encode_document`."""
        texts = [Passage("", passage.get("title") or "", passage["text"]).content for passage in corpus]
        return self._model.encode_document(texts, batch_size=batch_size, **options)
