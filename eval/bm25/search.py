"""The lexical baseline: BM25 over a corpus in memory, with bm25s."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.ranking import RankedRun
from index.files import InputError
from index.passages import Passage
from index.ties import best_first, id_ranks

# The defaults of Anserini and BEIR.
K1, B = 0.9, 0.4

# Han and Hiragana have no spaces between words: each character is a token, as in Lucene's StandardTokenizer.
# Katakana and Hangul form words, as in Lucene.
_SINGLE = "\u3005-\u3007\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Combining marks, which Python's \w does not match: vowel signs of Hindi and related scripts, combining accents.
_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x20000)) if unicodedata.category(sign).startswith("M"))
# Any other token has at least two letters, as in scikit-learn and bm25s.
TOKEN = rf"[{_SINGLE}]|[^\W{_SINGLE}](?:[^\W{_SINGLE}]+|[{_MARKS}]+)+"


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

    The defaults of k1 and b are those of Anserini and BEIR. A token is a lower-case word of at least two letters, or a
    single Chinese character or Hiragana. Stop words are removed; there is no stemming. As in Lucene, passages without
    a token of the query are not returned. The ranking is deterministic: score descending, then id descending, also at
    the cut-off.

    Args:
        passages: the corpus; title and text are concatenated.
        queries: query id -> text.
        k: maximum number of passages per query.
        k1: term frequency saturation.
        b: document length normalization, 0 to 1.
        stopwords: language of the stop words to remove (a name of bm25s), or None to remove none.
        progress: called with 1 after each query.

    Returns:
        The run; a query that matches no passage has an empty result.

    Raises:
        InputError: bm25s is not installed or lacks stop words for the language, or the corpus is empty.
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    index = Bm25(passages, k1=k1, b=b, stopwords=stopwords)
    scores, rows = index.search_rows(list(queries.values()), k, progress=progress)
    return RankedRun(list(queries), index.ids, rows, scores)


class Bm25:
    """The BM25 index of a corpus, in memory; `bm25_run` describes the ranking.

    Args:
        passages: the corpus of N passages; title and text are concatenated.
        k1: term frequency saturation.
        b: document length normalization, 0 to 1.
        stopwords: language of the stop words to remove (a name of bm25s), or None to remove none.

    Raises:
        InputError: bm25s is not installed or lacks stop words for the language, or the corpus is empty.
    """

    def __init__(
        self, passages: Iterable[Passage], *, k1: float = K1, b: float = B, stopwords: str | None = "en"
    ) -> None:
        self._bm25s = import_bm25s(stopwords)
        self._options: dict[str, Any] = {
            "token_pattern": TOKEN,
            "stopwords": stopwords or [],
            "show_progress": False,
        }
        self.ids: list[str] = []
        texts = []
        for passage in passages:
            self.ids.append(passage.id)
            texts.append(passage.content)
        if not texts:
            raise InputError("corpus: expected passages, found none")
        tokens = self._bm25s.tokenize(texts, **self._options)
        # bm25s cannot index a corpus that contains only stop words, and no query matches it.
        self._scorer: Any = None
        if tokens.vocab:
            self._scorer = self._bm25s.BM25(method="lucene", k1=k1, b=b)
            self._scorer.index(tokens, show_progress=False)
        self._id_ranks = id_ranks(self.ids)

    def search_rows(
        self,
        queries: Sequence[str],
        k: int,
        mask: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank the passages for queries.

        Args:
            queries: Q texts.
            k: maximum number of passages per query.
            mask: which passages may be returned, bool [N]. Default: None, all.
            progress: called with 1 after each query.

        Returns:
            scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int32, best first, padded with row -1 and score 0.
        """
        rows = np.full((len(queries), min(k, len(self.ids))), -1, dtype=np.int32)
        scores = np.zeros(rows.shape, dtype=np.float32)
        if self._scorer is None or not queries:
            return scores, rows
        for query, words in enumerate(self._bm25s.tokenize(list(queries), return_ids=False, **self._options)):
            known = self._scorer.get_tokens_ids(words)
            if known:
                all_scores = self._scorer.get_scores_from_ids(known)
                if mask is not None:
                    all_scores = np.where(mask, all_scores, 0)
                best, values = _top(all_scores, self._id_ranks, k)
                rows[query, : len(best)], scores[query, : len(best)] = best, values
            if progress is not None:
                progress(1)
        return scores, rows


def import_bm25s(stopwords: str | None) -> Any:
    """Import bm25s and check that it has stop words for the language.

    Raises:
        InputError: bm25s is not installed or lacks the language.
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


def _top(scores: np.ndarray, ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values of the k highest positive `scores` [N]; `ranks` are the `id_ranks` [N] (index/ties.py)."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        # Keep all ties with the k-th score, so that ids decide which of them make the cut-off.
        cut = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= cut]
    rows = rows[best_first(scores[rows], ranks[rows])][:k]
    return rows, scores[rows]
