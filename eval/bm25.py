"""The lexical baseline: BM25 over a corpus in memory, through bm25s."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError
from index.passages import Passage

K1, B = 0.9, 0.4

# Han and Hiragana, which are written without blanks: each character is a token, as in Lucene's StandardTokenizer.
# Katakana and Hangul are left as words, as there.
_ALONE = "\u3005-\u3007\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Signs within words that Python's \w leaves out: the vowels of Hindi and its kin, accents that stand for themselves.
_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x20000)) if unicodedata.category(sign).startswith("M"))
# Anything else is a token from two letters on, as in scikit-learn and bm25s.
TOKEN = rf"[{_ALONE}]|[^\W{_ALONE}](?:[^\W{_ALONE}]+|[{_MARKS}]+)+"


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

    The defaults of k1 and b are Anserini's and BEIR's. A token is a word of two letters or more in lower case, or one
    Chinese character or Hiragana, without stop words and without stemming. As in Lucene, passages that share no token
    with the query are not returned. The ranking is deterministic: score descending, then id descending, also at the
    cut.

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
        InputError: bm25s is not installed or has no stop words of that language, or the corpus is empty.
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    bm25s = bm25s_with(stopwords)
    ids, texts = [], []
    for passage in passages:
        ids.append(passage.id)
        texts.append(passage.content)
    if not ids:
        raise InputError("corpus: expected passages, found none")

    options: dict[str, Any] = {"token_pattern": TOKEN, "stopwords": stopwords or [], "show_progress": False}
    tokens = bm25s.tokenize(texts, **options)
    if not tokens.vocab:
        # Nothing but stop words: bm25s cannot index it, and no query matches.
        return RankedRun.of({query: {} for query in queries})
    scorer = bm25s.BM25(method="lucene", k1=k1, b=b)
    scorer.index(tokens, show_progress=False)
    asked = bm25s.tokenize(list(queries.values()), return_ids=False, **options)

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


def bm25s_with(stopwords: str | None) -> Any:
    """The bm25s module, if it has the stop words of that language.

    Raises:
        InputError: it has not, or is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError('BM25 needs bm25s: pip install "dense-retriever[bm25]"') from None
    try:
        bm25s.tokenize([], stopwords=stopwords or [], show_progress=False)
    except ValueError:
        raise InputError(
            f"BM25's stop words: expected a language that bm25s {bm25s.__version__} knows (en, de, fr, zh …) or none, "
            f"found {stopwords}"
        ) from None
    return bm25s


def _top(scores: np.ndarray, id_order: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the k best of `scores` [N] above 0; ties by `id_order` [N], the ids' rank, descending."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        # Everything that ties with the k-th score stays until the ids have decided.
        cut = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= cut]
    rows = rows[np.lexsort((-id_order[rows], -scores[rows]))][:k]
    return rows, scores[rows]
