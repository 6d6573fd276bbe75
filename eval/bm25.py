"""The lexical baseline: BM25 over a corpus in memory, through bm25s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError
from index.passages import Passage

K1, B = 0.9, 0.4


def bm25_run(
    passages: Iterable[Passage],
    queries: Mapping[str, str],
    k: int = 1000,
    *,
    k1: float = K1,
    b: float = B,
    stopwords: str | None = "en",
    progress: Callable[[int], None] | None = None,
) -> RankedRun:
    """Rank passages by BM25 (Robertson and Zaragoza 2009; Lucene's variant, after Kamphuis et al. 2020).

    The defaults of k1 and b are Anserini's and BEIR's. A token is a word of two letters or more in lower case,
    without English stop words and without stemming. As in Lucene, passages that share no token with the query are not
    returned. The ranking is deterministic: score descending, then id descending, also at the cut.

    Args:
        passages: the corpus; title and text are read as one.
        queries: query id -> text.
        k: passages a query at most.
        k1: saturation of a token's count in a passage.
        b: how much long passages are held back, 0 to 1.
        stopwords: the language whose stop words are dropped (bm25s's names), or None for none.
        progress: called with 1 after every query.

    Returns:
        The run over the corpus's passages; a query that matches nothing has no passages.

    Raises:
        InputError: bm25s is not installed, or the corpus is empty.
        ValueError: `k` is below 1.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError('BM25 needs bm25s: pip install "dense-retriever[bm25]"') from None
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    ids, texts = [], []
    for passage in passages:
        ids.append(passage.id)
        texts.append(passage.content)
    if not ids:
        raise InputError("corpus: expected passages, found none")

    tokens = bm25s.tokenize(texts, stopwords=stopwords or [], show_progress=False)
    if not tokens.vocab:
        # Nothing but stop words: bm25s cannot index it, and no query matches.
        return RankedRun.of({query: {} for query in queries})
    scorer = bm25s.BM25(method="lucene", k1=k1, b=b)
    scorer.index(tokens, show_progress=False)
    asked = bm25s.tokenize(list(queries.values()), stopwords=stopwords or [], return_ids=False, show_progress=False)

    id_order = np.empty(len(ids), dtype=np.int64)
    id_order[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    places = np.full((len(queries), min(k, len(ids))), -1, dtype=np.int32)
    scores = np.zeros(places.shape, dtype=np.float32)
    for number, words in enumerate(asked):
        known = scorer.get_tokens_ids(words)
        if known:
            found, values = _top(scorer.get_scores_from_ids(known), id_order, k)
            places[number, : len(found)], scores[number, : len(found)] = found, values
        if progress is not None:
            progress(1)
    return RankedRun(list(queries), ids, places, scores)


def _top(scores: np.ndarray, id_order: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the k best of `scores` [N] above 0; ties by `id_order` [N], the ids' rank, descending."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        # Everything that ties with the k-th score stays until the ids have decided.
        cut = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= cut]
    rows = rows[np.lexsort((-id_order[rows], -scores[rows]))][:k]
    return rows, scores[rows]
