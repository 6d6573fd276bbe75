"""Mining of hard negatives for the rows of a training source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from index.progress import Reporter
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example
from retriever.data.table import ExampleTable
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.mining.candidates import find_candidates, select
from retriever.mining.corpus import Corpus
from retriever.mining.options import MiningOptions
from retriever.mining.texts import Keys, KnownPairs, text_key, text_keys
from retriever.models.towers import Side, Towers

Rescore = Callable[[Sequence[tuple[str, str]], Callable[[int], None]], np.ndarray]
"""(query, passage) pairs and progress -> float32 [pairs], for example the scores of a cross-encoder."""


@contextlib.contextmanager
def prompts_of(source: SourceConfig, towers: Towers) -> Iterator[None]:
    """Context in which a model has the prompts of a source.

    Raises:
        InputError: A prompt takes up all tokens of a text.
    """
    own: tuple[tuple[Side, str | None], ...] = (("query", source.query_prompt), ("document", source.passage_prompt))
    if source.query_prompt is None and source.passage_prompt is None:
        yield
        return
    saved = dict(towers.model.prompts)
    for side, prompt in own:
        if prompt is not None:
            towers.check_prompt(prompt, side)
            towers.model.prompts[side] = prompt
    try:
        yield
    finally:
        towers.model.prompts.clear()
        towers.model.prompts.update(saved)


@dataclass(frozen=True)
class MinedRow:
    """A row of a training source with its hard negatives, or with too few pairs left.

    Attributes:
        example: The kept positives and the negatives, hardest first, with the scores of both. None if no positive is
            kept.
        dropped: Number of positives that are not kept.
    """

    example: Example | None
    dropped: int


@dataclass(frozen=True)
class _Query:
    """A distinct query of some rows."""

    text: str
    prompt: str | None
    """Its own prompt. None: that of the model."""
    known: Keys
    """Keys of its known positives."""
    excluded: Keys
    """Keys of texts that are not candidates."""


class Miner:
    """Finds the hard negatives of rows. The result for a row does not depend on the other rows that are mined with it.

    A row's candidates are the `depth` distinct texts that score highest for its query. Texts (title and text) that
    differ only in case or white space are the same text, which scores as the best of its passages. Empty texts and
    positives that any row pairs with an equal query are not candidates.

    Args:
        towers: The model in evaluation mode, on the device to use.
        encoding: Precision and micro-batch size.
        corpus: The passages.
        known: All pairs of a query and a positive.
        options: Which negatives are taken, and which pairs are kept.
        identical: Further pairs of a query and a text that is not a candidate. Default: None.
        rescore: Scores that replace those of the model in the choice of negatives. Default: None.
    """

    def __init__(
        self,
        towers: Towers,
        encoding: EncodeOptions,
        corpus: Corpus,
        known: KnownPairs,
        options: MiningOptions,
        *,
        identical: KnownPairs | None = None,
        rescore: Rescore | None = None,
    ) -> None:
        self._towers, self._encoding, self._corpus, self._known = towers, encoding, corpus, known
        self._options, self._identical, self._rescore = options, identical, rescore

    def mine(self, table: ExampleTable, start: int, stop: int, reporter: Reporter) -> list[MinedRow]:
        """Mine the rows from `start` up to `stop` of a table."""
        examples = [table[row] for row in range(start, stop)]
        numbers: dict[tuple[str | None, str], int] = {}
        query_of = [numbers.setdefault((row.query_prompt, row.query), len(numbers)) for row in examples]
        queries = [self._query(text, prompt) for prompt, text in numbers]
        with reporter.bar("encode queries", len(queries), "queries") as advance:
            vectors = self._embed_queries(queries, advance)
        with reporter.bar("search", len(self._corpus.texts), "passages") as advance:
            found = find_candidates(
                lambda some, k: self._corpus.search(some, k, advance),
                vectors,
                self._corpus.texts.keys,
                [query.excluded for query in queries],
                self._options.candidates,
            )
        best_known = self._best_known(queries, vectors)
        own = self._own_scores(examples, query_of, vectors)
        rows = [
            _Row(example, scores, found[query], best_known[query])
            for example, scores, query in zip(examples, own, query_of, strict=True)
        ]
        if self._rescore is None:
            rescored = [(row.positives, row.candidates[0][self._options.skip :], row.best) for row in rows]
        else:
            candidates = {row for _, rows in found for row in rows[self._options.skip :].tolist()}
            rescored = self._rescored(self._rescore, rows, self._corpus.texts.contents(candidates), reporter)
        chosen = [
            self._choose(row, number, *scores)
            for number, (row, scores) in enumerate(zip(rows, rescored, strict=True), start=start)
        ]
        texts = self._corpus.texts.contents({row for _, negatives in chosen for row in negatives})
        return [_with_negatives(mined, [texts[row] for row in negatives]) for mined, negatives in chosen]

    def _query(self, text: str, prompt: str | None) -> _Query:
        key = text_key(text)
        known = self._known.of(key)
        excluded = known if self._identical is None else np.concatenate([known, self._identical.of(key)])
        return _Query(text, prompt, known, excluded)

    def _embed_queries(self, queries: Sequence[_Query], progress: Callable[[int], None]) -> np.ndarray:
        vectors = np.empty((len(queries), self._towers.dimension), np.float32)
        for prompt in dict.fromkeys(query.prompt for query in queries):
            positions = [i for i, query in enumerate(queries) if query.prompt == prompt]
            texts = [queries[i].text for i in positions]
            vectors[positions] = embed_texts(self._towers, texts, "query", self._encoding, progress, prompt=prompt)
        return vectors

    def _best_known(self, queries: Sequence[_Query], vectors: np.ndarray) -> np.ndarray:
        """The highest score of each query's known positives in the corpus, float32 [Q]; −inf without one."""
        best = np.full(len(queries), -np.inf, np.float32)
        counts = [len(query.known) for query in queries]
        keys = np.concatenate([np.empty(0, np.uint64), *(query.known for query in queries)])
        positions, rows = self._corpus.texts.rows_of(keys)
        query = np.repeat(np.arange(len(queries)), counts)[positions]
        if (products := self._corpus.products(vectors[query], rows)) is not None:
            np.maximum.at(best, query, products)
        return best

    def _own_scores(
        self, examples: Sequence[Example], query_of: Sequence[int], vectors: np.ndarray
    ) -> list[np.ndarray]:
        """The score of each positive of each row. A positive that is not in the corpus is embedded."""
        texts = [text for example in examples for text in example.positives]
        counts = [len(example.positives) for example in examples]
        queries = vectors[np.repeat(np.asarray(query_of, np.int64), counts)]
        scores = np.full(len(texts), -np.inf, np.float32)
        positions, rows = self._corpus.texts.rows_of(text_keys(texts))
        if (products := self._corpus.products(queries[positions], rows)) is not None:
            np.maximum.at(scores, positions, products)
        if len(missing := np.flatnonzero(np.isneginf(scores))):
            distinct = list(dict.fromkeys(texts[i] for i in missing))
            number = {text: i for i, text in enumerate(distinct)}
            passages = embed_texts(self._towers, distinct, "document", self._encoding)
            of_missing = passages[[number[texts[i]] for i in missing]].astype(np.float64)
            scores[missing] = np.einsum("pd,pd->p", queries[missing].astype(np.float64), of_missing)
        return np.split(scores, np.cumsum(counts)[:-1])

    def _rescored(
        self,
        rescore: Rescore,
        rows: Sequence[_Row],
        texts: dict[int, str],
        reporter: Reporter,
    ) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Positives' scores, candidates' scores and the best positive of each row, by another model."""
        pairs: dict[tuple[str, str], int] = {}
        # Rows with equal queries have the same candidates.
        for row in rows:
            for text in self._texts_of(row, texts):
                pairs.setdefault((row.example.query, text), len(pairs))
        with reporter.bar("score with the cross-encoder", len(pairs), "pairs") as advance:
            scores = rescore(list(pairs), advance)
        results = []
        for row in rows:
            of_row = np.array([scores[pairs[row.example.query, text]] for text in self._texts_of(row, texts)])
            own = of_row[: len(row.positives)].astype(np.float32)
            results.append((own, of_row[len(own) :].astype(np.float32), float(own.max())))
        return results

    def _texts_of(self, row: _Row, texts: dict[int, str]) -> list[str]:
        candidates = row.candidates[1][self._options.skip :].tolist()
        return [*row.example.positives, *(texts[candidate] for candidate in candidates)]

    def _choose(
        self, row: _Row, number: int, positives: np.ndarray, candidates: np.ndarray, best: float
    ) -> tuple[MinedRow, list[int]]:
        """The row without its negatives, and the corpus rows of these."""
        options, example = self._options, row.example
        kept = list(range(len(example.positives)))
        if options.keep_top is not None:
            better = [int(np.count_nonzero(row.candidates[0] > score)) for score in row.positives]
            kept = [i for i in kept if better[i] < options.keep_top]
        dropped = len(example.positives) - len(kept)
        if not kept:
            return MinedRow(None, dropped), []
        order = np.argsort(-candidates, kind="stable")
        taken = order[
            select(
                candidates[order],
                best,
                negatives=options.negatives,
                max_share=options.max_share,
                margin=options.margin,
                max_score=options.max_score,
                min_score=options.min_score,
                seed=[options.seed, number] if options.sampling == "random" else None,
            )
        ]
        scores = (*positives[kept].tolist(), *candidates[taken].tolist())
        mined = replace(example, positives=tuple(example.positives[i] for i in kept), negatives=(), scores=scores)
        return MinedRow(mined, dropped), row.candidates[1][options.skip :][taken].tolist()


def _with_negatives(row: MinedRow, negatives: list[str]) -> MinedRow:
    if row.example is None:
        return row
    return replace(row, example=replace(row.example, negatives=tuple(negatives)))


@dataclass(frozen=True)
class _Row:
    """A row with its scores by the model."""

    example: Example
    positives: np.ndarray
    """Score of each positive."""
    candidates: tuple[np.ndarray, np.ndarray]
    """Scores and corpus rows of the query's candidates, best first."""
    best_known: float

    @property
    def best(self) -> float:
        """The score of the best positive that any row pairs with the query."""
        return max(float(self.best_known), float(self.positives.max()))
