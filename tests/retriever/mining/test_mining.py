"""Mined negatives are the best passages that are not relevant and do not score close to a positive."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import retriever.mining.miner as miner_module
from index.beir import BeirDataset
from index.passages import Passage
from index.progress import SilentReporter
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example, Notices, read_examples
from retriever.data.table import ExampleTable, open_source
from retriever.encoding.encoder import EncodeOptions
from retriever.mining.corpus import StoreCorpus
from retriever.mining.mine import identical_ids
from retriever.mining.miner import Miner
from retriever.mining.options import MiningOptions
from retriever.mining.texts import KnownPairs


class Vectors:
    """Towers that look up the vectors of texts."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = vectors
        self.dimension = len(next(iter(vectors.values())))

    def embed_texts(self, towers: Any, texts: Sequence[str], *_: object, **__: object) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], np.float32)


def mined(
    table: ExampleTable,
    store: EmbeddingStore,
    queries: dict[str, Sequence[float]],
    options: MiningOptions,
    *,
    rows: tuple[int, int] | None = None,
    **further: Any,
) -> list[Example | None]:
    towers, reporter = Vectors(queries), SilentReporter()
    corpus = StoreCorpus(store, "cpu", reporter)
    miner = Miner(towers, EncodeOptions(), corpus, KnownPairs.of_table(table), options, **further)  # type: ignore[arg-type]
    with mock.patch.object(miner_module, "embed_texts", towers.embed_texts):
        return [row.example for row in miner.mine(table, *(rows or (0, len(table))), reporter)]


def write_store(folder: Path, passages: list[Passage], vectors: np.ndarray, shard_rows: int) -> EmbeddingStore:
    with EmbeddingWriter(
        folder, dim=vectors.shape[1], dtype="float32", model={}, source={}, shard_rows=shard_rows
    ) as writer:
        writer.append(passages, vectors.astype(np.float32))
        writer.close()
    return EmbeddingStore.open(folder)


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[ExampleTable, EmbeddingStore, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """20 rows of two positives, of which one is no passage of the store, and 300 passages."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(301, 8)).astype(np.float32)
    queries = random.normal(size=(20, 8)).astype(np.float32)
    positives = random.choice(300, size=20, replace=False)
    lines = [
        {"query": f"query {q}", "positive": [f"text {row}", "text 300"]} for q, row in enumerate(positives.tolist())
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = write_store(
        tmp_path / "store", [Passage(f"p{row}", "", f"text {row}") for row in range(300)], vectors[:300], 64
    )
    known = {f"query {q}": queries[q] for q in range(20)} | {"text 300": vectors[300]}
    return open_source(SourceConfig(str(path)), tmp_path), store, known, queries @ vectors.T, positives


@pytest.mark.parametrize(
    "options",
    [
        MiningOptions(5, 200, max_share=0.9),
        MiningOptions(5, 20, skip=3, max_share=None, margin=0.5),
        MiningOptions(5, max_share=None, max_score=2.0, min_score=1.0),
        MiningOptions(5, 50, max_share=None, sampling="random", seed=3),
        MiningOptions(2, 10, max_share=None, keep_top=15),
    ],
)
def test_negatives_equal_those_of_a_full_sort(pairs: Any, options: MiningOptions) -> None:
    table, store, queries, scores, positives = pairs
    found = mined(table, store, queries, options)
    dropped = 0
    for q, row in enumerate(found):
        own = [positives[q], 300]
        best = scores[q, own].max()
        ranked = [r for r in np.argsort(-scores[q, :300]) if r != positives[q]]
        kept = [p for p in own if sum(scores[q, r] > scores[q, p] for r in ranked) < (options.keep_top or 301)]
        dropped += len(own) - len(kept)
        if not kept:
            assert row is None
            continue
        allowed = [
            r
            for r in ranked[options.skip : max(options.depth, options.keep_top or 0)]
            if (options.max_share is None or scores[q, r] <= best - (1 - options.max_share) * abs(best))
            and (options.margin is None or scores[q, r] <= best - options.margin)
            and (options.max_score is None or scores[q, r] <= options.max_score)
            and (options.min_score is None or scores[q, r] >= options.min_score)
        ]
        assert row is not None and row.positives == tuple(f"text {p}" for p in kept)
        negatives = [int(text.split()[1]) for text in row.negatives]
        if options.sampling == "top":
            assert negatives == allowed[: options.negatives]
        else:
            assert len(negatives) == min(5, len(allowed)) and set(negatives) <= set(allowed)
            assert negatives == [r for r in allowed if r in negatives]
        assert row.scores == pytest.approx(scores[q, [*kept, *negatives]].tolist(), rel=1e-5)
    assert (dropped > 0) == (options.keep_top is not None)
    if options.sampling == "random":
        assert any(row.negatives[0] != f"text {np.argsort(-scores[q])[0]}" for q, row in enumerate(found) if row)
    # A row's result does not depend on the rows that are mined with it.
    assert mined(table, store, queries, options, rows=(7, 9)) == found[7:9]


def test_another_model_rescores_candidates_and_positives(pairs: Any) -> None:
    table, store, queries, scores, positives = pairs

    def rescore(texts: Sequence[tuple[str, str]], progress: object) -> np.ndarray:
        return np.array([-int(text.split()[1]) for _, text in texts], np.float32)

    for q, row in enumerate(
        mined(table, store, queries, MiningOptions(5, 20, max_share=None, margin=20.0), rescore=rescore)
    ):
        # The best positive is the one with the smaller number.
        ranked = [r for r in np.argsort(-scores[q, :300]) if r != positives[q]][:20]
        expected = sorted(r for r in ranked if r >= positives[q] + 20)[:5]
        assert row is not None and [int(text.split()[1]) for text in row.negatives] == expected
        assert row.scores == tuple(-float(number) for number in (positives[q], 300, *expected))


# Few texts, so that duplicates are common: " a" and ("a", "") are "a" once title and text are joined and stripped.
TEXTS = st.sampled_from(["", " ", "a", " a", "A", "b", "b ", "c", "d", "D  d", "d\td", "e\0", "e\ufffd"])
PASSAGES = st.lists(st.tuples(st.sampled_from(["", "a", "t"]), TEXTS), min_size=1, max_size=14)


@st.composite
def corpora(draw: st.DrawFn) -> dict:
    passages = draw(PASSAGES)
    texts = st.sampled_from(["q", "q ", "Q", "q q", "q  Q", "r"])
    queries = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    grades = st.dictionaries(st.integers(0, len(passages) - 1), st.integers(0, 2), min_size=1, max_size=4)
    numbers = st.integers(-3, 3)
    vector = st.tuples(numbers, numbers)
    return {
        "passages": passages,
        "queries": queries,
        "judged": [draw(grades) for _ in queries],
        "vectors": [draw(vector) for _ in passages],
        "query_vectors": [draw(vector) for _ in queries],
        # Passages and queries with the same ids, or none.
        "prefix": draw(st.sampled_from(["p", "q"])),
        "negatives": draw(st.integers(1, 4)),
        "depth": draw(st.integers(1, 6)),
        "max_share": draw(st.sampled_from([0.5, 1.0])),
        "keep_identical_ids": draw(st.booleans()),
    }


DUPLICATES = {
    "passages": [("", "a"), ("", "b"), ("", "b"), ("", "c"), ("", "c"), ("", ""), ("", "d")],
    "queries": ["q", "q "],
    "judged": [{0: 1, 1: 1}, {6: 1}],
    "vectors": [(3, 0), (2, 0), (2, 0), (1, 0), (1, 0), (1, 1), (0, 1)],
    "query_vectors": [(1, 0), (1, 0)],
    "prefix": "p",
    "negatives": 3,
    "depth": 1,
    "max_share": 1.0,
    "keep_identical_ids": False,
}
# Texts that differ only in case and white space are duplicates.
SAME_WHEN_FOLDED = {
    **DUPLICATES,
    "passages": [("", "A thing"), ("", "a  THING"), ("", "B"), ("", "b"), ("", "c\nc"), ("C", "c"), ("", "d")],
    "queries": ["what is it", "What  is it"],
    "judged": [{0: 1}, {2: 1}],
    "negatives": 4,
}


@settings(max_examples=30, deadline=None)
@given(corpora())
@example(DUPLICATES)
@example(SAME_WHEN_FOLDED)
@example({**DUPLICATES, "prefix": "q"})
@example({**DUPLICATES, "prefix": "q", "keep_identical_ids": True})
def test_negatives_are_distinct_texts_and_not_positives_of_an_equal_query(corpus: dict) -> None:
    """Compares with a direct search over texts; duplicates must not hide other candidates."""
    content = [f"{title} {text}".strip().replace("\0", "\ufffd") for title, text in corpus["passages"]]
    ids = [f"{corpus['prefix']}{row}" for row in range(len(content))]
    expected = []
    for q, (text, vector) in enumerate(zip(corpus["queries"], corpus["query_vectors"], strict=True)):
        scores = [float(np.dot(vector, passage)) for passage in corpus["vectors"]]
        equal = [n for n, other in enumerate(corpus["queries"]) if _folded(other) == _folded(text)]
        positives = {content[row] for row, grade in corpus["judged"][q].items() if grade > 0} - {""}
        relevant = {_folded(content[row]) for n in equal for row, grade in corpus["judged"][n].items() if grade > 0} - {
            ""
        }
        excluded = {"", *relevant}
        for n in equal:
            is_identical = corpus["prefix"] == "q" and n < len(ids) and n not in corpus["judged"][n]
            if is_identical and not corpus["keep_identical_ids"]:
                excluded.add(_folded(content[n]))
        best = max((scores[row] for row in range(len(ids)) if _folded(content[row]) in relevant), default=-np.inf)
        ranked = sorted(range(len(ids)), key=lambda row: (scores[row], ids[row]), reverse=True)
        candidates: dict[str, int] = {}
        for row in ranked:
            if _folded(content[row]) not in excluded:
                candidates.setdefault(_folded(content[row]), row)
        considered = list(candidates.values())[: max(corpus["depth"], corpus["negatives"])]
        limit = best - (1 - corpus["max_share"]) * abs(best)
        negatives = [content[row] for row in considered if scores[row] <= limit][: corpus["negatives"]]
        if positives:
            expected.append((text, positives, negatives))
    if not expected:
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = _mined_from(corpus, Path(temporary))
    rows = [(row.query, set(row.positives), [text.replace("\0", "\ufffd") for text in row.negatives]) for row in found]
    assert rows == expected


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _mined_from(corpus: dict, folder: Path) -> list[Example]:
    (folder / "qrels").mkdir()
    passages = [Passage(f"{corpus['prefix']}{n}", *texts) for n, texts in enumerate(corpus["passages"])]
    rows = [{"_id": p.id, "title": p.title, "text": p.text} for p in passages]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(corpus["queries"])]
    for name, lines in (("corpus.jsonl", rows), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [(q, row, grade) for q, grades in enumerate(corpus["judged"]) for row, grade in grades.items()]
    lines = [f"q{q}\t{corpus['prefix']}{row}\t{grade}\n" for q, row, grade in judged]
    (folder / "qrels" / "train.tsv").write_text("".join(lines))
    identical = identical_ids(BeirDataset.open(folder, "train"), SilentReporter())
    found = mined(
        open_source(SourceConfig(str(folder)), folder),
        write_store(folder / "store", passages, np.array(corpus["vectors"]), 5),
        dict(zip(corpus["queries"], corpus["query_vectors"], strict=True)),
        MiningOptions(corpus["negatives"], corpus["depth"], max_share=corpus["max_share"]),
        identical=None if corpus["keep_identical_ids"] else identical,
    )
    assert None not in found
    return [row for row in found if row is not None]


def test_the_file_is_a_training_source(pairs: Any, tmp_path: Path) -> None:
    from retriever.mining.parts import example_line

    table, store, queries, _, _ = pairs
    found = [row for row in mined(table, store, queries, MiningOptions(3)) if row is not None]
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(example_line(row, SourceConfig("x")) + "\n" for row in found))
    assert list(read_examples(SourceConfig(str(path)), Notices())) == found
