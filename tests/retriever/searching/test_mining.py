"""Mined negatives are the best passages that are not relevant and do not score close to a positive."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from index.beir import BeirDataset
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.config.sources import SourceConfig
from retriever.data.sources import Notices, read_examples
from retriever.searching.mining import MiningOptions, mine


def test_negatives_equal_those_of_a_full_sort(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder, rows, dim = tmp_path / "data", 300, 8
    (folder / "qrels").mkdir(parents=True)
    vectors = random.normal(size=(rows, dim)).astype(np.float32)
    queries = random.normal(size=(20, dim)).astype(np.float32)
    passages = [Passage(f"p{row}", "", f"text {row}") for row in range(rows)]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": p.id, "title": "", "text": p.text}) + "\n" for p in passages)
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{q}", "text": f"query {q}"}) + "\n" for q in range(20))
    )
    judged = {q: random.choice(rows, size=3, replace=False).tolist() for q in range(20)}
    # The last judgement of each query has grade 0 and is not relevant.
    lines = [f"q{q}\tp{row}\t{int(n < 2)}" for q, rows_of_q in judged.items() for n, row in enumerate(rows_of_q)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    with EmbeddingWriter(tmp_path / "store", dim=dim, dtype="float32", model={}, source={}, shard_rows=64) as writer:
        writer.append(passages, vectors)
        writer.close()

    out = tmp_path / "hard.jsonl"
    dataset = BeirDataset.open(folder, "train")
    store = EmbeddingStore.open(tmp_path / "store")
    written, short = mine(dataset, store=store, queries=queries, out=out, options=MiningOptions(5, 200, 0.9))

    mined = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == len(mined) == 20
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    expected_short = 0
    for q, row in enumerate(mined):
        positives = judged[q][:2]
        best = scores[q, positives].max()
        limit = best - 0.1 * abs(best)
        ranked = [r for r in np.argsort(-scores[q])[:200] if scores[q, r] <= limit and r not in positives][:5]
        assert row["query"] == f"query {q}"
        assert sorted(row["positive"]) == sorted(f"text {r}" for r in positives)
        assert row["negatives"] == [f"text {r}" for r in ranked]
        expected_short += len(ranked) < 5
    assert 0 < expected_short == short < 20

    # The file is a training source.
    examples = list(read_examples(SourceConfig(path=str(out)), Notices()))
    assert [list(example.negatives) for example in examples] == [row["negatives"] for row in mined]


# Few texts, so that duplicates are common: " a" and ("a", "") are "a" once title and text are joined and stripped.
TEXTS = st.sampled_from(["", " ", "a", " a", "A", "b", "b ", "c", "d", "D  d", "d\td", "e\0", "e\ufffd"])
PASSAGES = st.lists(st.tuples(st.sampled_from(["", "a", "t"]), TEXTS), min_size=1, max_size=14)


@st.composite
def corpora(draw: st.DrawFn) -> dict:
    passages = draw(PASSAGES)
    queries = draw(st.lists(st.sampled_from(["q", "q ", "Q", "q q", "q  Q", "r"]), min_size=1, max_size=4))
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
    "queries": ["q", "q"],
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
    with tempfile.TemporaryDirectory() as temporary:
        mined = _mined(corpus, Path(temporary))
    content = [f"{title} {text}".strip().replace("\0", "\ufffd") for title, text in corpus["passages"]]
    ids = [f"{corpus['prefix']}{row}" for row in range(len(content))]
    expected = []
    for q, (text, vector) in enumerate(zip(corpus["queries"], corpus["query_vectors"], strict=True)):
        scores = [float(np.dot(vector, passage)) for passage in corpus["vectors"]]
        equal = [n for n, other in enumerate(corpus["queries"]) if _folded(other) == _folded(text)]
        relevant = {row for n in equal for row, grade in corpus["judged"][n].items() if grade > 0}
        excluded = {"", *(_folded(content[row]) for row in relevant)}
        is_identical = corpus["prefix"] == "q" and q < len(ids) and q not in corpus["judged"][q]
        if is_identical and not corpus["keep_identical_ids"]:
            excluded.add(_folded(content[q]))
        best = max((scores[row] for row in relevant), default=-np.inf)
        ranked = sorted(range(len(ids)), key=lambda row: (scores[row], ids[row]), reverse=True)
        candidates: dict[str, int] = {}
        for row in ranked:
            if _folded(content[row]) not in excluded:
                candidates.setdefault(_folded(content[row]), row)
        considered = list(candidates.values())[: max(corpus["depth"], corpus["negatives"])]
        limit = best - (1 - corpus["max_share"]) * abs(best)
        negatives = [content[row] for row in considered if scores[row] <= limit][: corpus["negatives"]]
        positives = {content[row] for row, grade in corpus["judged"][q].items() if grade > 0} - {""}
        if positives:
            expected.append((text, positives, negatives))
    found = [(row["query"], row["positive"], [_read(text) for text in row["negatives"]]) for row in mined]
    assert [(query, {*map(_read, positives)}, negatives) for query, positives, negatives in found] == expected
    assert all(len({*map(_read, positives)}) == len(positives) for _, positives, _ in found)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _read(text: str) -> str:
    """Training replaces NUL by U+FFFD."""
    return text.replace("\0", "\ufffd")


def _mined(corpus: dict, folder: Path) -> list[dict]:
    (folder / "qrels").mkdir()
    passages = [Passage(f"{corpus['prefix']}{n}", *texts) for n, texts in enumerate(corpus["passages"])]
    rows = [{"_id": p.id, "title": p.title, "text": p.text} for p in passages]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(corpus["queries"])]
    for name, lines in (("corpus.jsonl", rows), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [(q, row, grade) for q, grades in enumerate(corpus["judged"]) for row, grade in grades.items()]
    lines = [f"q{q}\t{corpus['prefix']}{row}\t{grade}\n" for q, row, grade in judged]
    (folder / "qrels" / "train.tsv").write_text("".join(lines))
    with EmbeddingWriter(folder / "store", dim=2, dtype="float32", model={}, source={}, shard_rows=5) as writer:
        writer.append(passages, np.array(corpus["vectors"], np.float32))
    dataset, out = BeirDataset.open(folder, "train"), folder / "mined.jsonl"
    written, short = mine(
        dataset,
        store=EmbeddingStore.open(folder / "store"),
        queries=np.array(corpus["query_vectors"], np.float32),
        out=out,
        options=MiningOptions(corpus["negatives"], corpus["depth"], corpus["max_share"], corpus["keep_identical_ids"]),
    )
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == len(mined) and short == sum(len(row["negatives"]) < corpus["negatives"] for row in mined)
    return mined
