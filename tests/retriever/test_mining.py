"""Mined negatives are the best-scoring passages that are neither relevant nor suspiciously close to a positive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from index.beir import BeirDataset
from index.embeddings import EmbeddingStore, EmbeddingWriter
from index.passages import Passage
from retriever.data.sources import Notices, SourceConfig, read_examples
from retriever.mining import mine


def test_negatives_are_those_of_a_full_sort(tmp_path: Path) -> None:
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
    # The last judgement of each query is grade 0: judged, and not relevant.
    lines = [f"q{q}\tp{row}\t{int(place < 2)}" for q, picked in judged.items() for place, row in enumerate(picked)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    with EmbeddingWriter(tmp_path / "store", dim=dim, dtype="float32", model={}, source={}, shard_rows=64) as writer:
        writer.append(passages, vectors)
        writer.close()

    out = tmp_path / "hard.jsonl"
    dataset = BeirDataset.open(folder, "train")
    store = EmbeddingStore.open(tmp_path / "store")
    written, short = mine(dataset, store=store, queries=queries, out=out, negatives=5, depth=200, max_share=0.9)

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

    # What was mined is a training source as it is.
    examples = list(read_examples(SourceConfig(path=str(out)), Notices()))
    assert [list(example.negatives) for example in examples] == [row["negatives"] for row in mined]
