"""Evaluation on a BEIR split is exact, also with a single query, ties and identical ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from beir.retrieval.evaluation import EvaluateRetrieval

from eval import approximate
from eval.approximate import search_by_parts
from eval.evaluate import evaluate_beir, exact_search, ranked_run
from eval.runs import write_trec_run
from index.beir import BeirDataset
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

DIM = 8


def make(
    tmp_path: Path, passages: Sequence[str], qrels: dict[str, dict[str, int]], vectors: np.ndarray
) -> tuple[BeirDataset, EmbeddingStore]:
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": passage, "title": "", "text": passage}) for passage in passages]
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    queries = [json.dumps({"_id": query, "text": f"text of {query}"}) for query in qrels]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    judged = [f"{query}\t{passage}\t{grade}\n" for query, grades in qrels.items() for passage, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    dataset = BeirDataset.open(folder)
    with EmbeddingWriter(tmp_path / "store", dim=DIM, model={"name": "toy"}, source={}, shard_rows=7) as writer:
        writer.append(list(dataset.passages()), vectors)
    return dataset, EmbeddingStore.open(tmp_path / "store")


def embedder(vectors: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    def embed(texts: Sequence[str]) -> np.ndarray:
        assert len(texts) == len(vectors) and all(text.startswith("text of ") for text in texts)
        return vectors

    return embed


def unit(generator: np.random.Generator, rows: int) -> np.ndarray:
    vectors = generator.normal(size=(rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("questions", [1, 5])
def test_equals_a_full_sort_and_the_beir_package(tmp_path: Path, questions: int) -> None:
    generator = np.random.default_rng(questions)
    passages = [f"d{i}" for i in range(23)]
    qrels = {
        f"q{i}": {f"d{j}": 1 + int(j) % 2 for j in generator.choice(23, 4, replace=False)} for i in range(questions)
    }
    corpus, queries = unit(generator, 23), unit(generator, questions)
    dataset, store = make(tmp_path, passages, qrels, corpus)
    run, metrics = evaluate_beir(dataset, store=store, embed_queries=embedder(queries), k=10)
    for i, query in enumerate(qrels):
        products = corpus.astype(np.float64) @ queries[i]
        assert list(run[query]) == [passages[row] for row in np.argsort(-products)[:10]]
    theirs = EvaluateRetrieval.evaluate(qrels, {q: dict(scores) for q, scores in run.items()}, [1, 10])
    assert metrics.mean["ndcg@10"] == pytest.approx(theirs[0]["NDCG@10"], abs=5.1e-6)
    assert metrics.mean["recall@10"] == pytest.approx(theirs[2]["Recall@10"], abs=5.1e-6)


def test_a_query_that_is_a_passage_still_gets_k_others(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    corpus = unit(generator, 9)
    passages = [f"d{i}" for i in range(9)]
    dataset, store = make(tmp_path, passages, {"d3": {"d5": 1}, "q": {"d1": 1}}, corpus)
    run, _ = evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[[3, 1]]), k=4)
    assert "d3" not in run["d3"] and [len(scores) for scores in run.values()] == [4, 4]
    assert next(iter(run["q"])) == "d1"


def test_a_corpus_smaller_than_k_is_returned_completely(tmp_path: Path) -> None:
    corpus = np.ones((3, DIM), dtype=np.float32)
    dataset, store = make(tmp_path, ["a", "b", "c"], {"q": {"b": 1}}, corpus)
    run, metrics = evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1]))
    assert list(run["q"]) == ["c", "b", "a"]
    assert (metrics.mean["mrr@1"], metrics.mean["mrr@3"], metrics.mean["recall@1000"]) == (0.0, 0.5, 1.0)


def test_cut_offs_deeper_than_the_run_are_left_out(tmp_path: Path) -> None:
    corpus = np.ones((3, DIM), dtype=np.float32)
    dataset, store = make(tmp_path, ["a", "b", "c"], {"q": {"b": 1}}, corpus)
    _, metrics = evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1]), k=2)
    assert [name for name in metrics.mean if name.startswith("ndcg")] == ["ndcg@1"]


def test_rankings_are_the_same_bytes_for_any_block_size(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    corpus, queries = unit(generator, 60), unit(generator, 11)
    corpus[40:] = corpus[:20]  # ties, broken by id
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(11)}
    dataset, store = make(tmp_path, [f"d{i}" for i in range(60)], qrels, corpus)
    ids = store.ids()
    runs = [
        ranked_run(dataset, ids, exact_search(store, ids, block_rows=rows), lambda: queries, 30)
        for rows in (1, 13, 16384)
    ]
    assert len({(run.rows.tobytes(), run.scores.tobytes()) for run in runs}) == 1
    for n, run in enumerate(runs):
        write_trec_run(tmp_path / f"{n}.trec", run, "t")
    assert len({(tmp_path / f"{n}.trec").read_bytes() for n in range(3)}) == 1


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    corpus = np.ones((2, DIM), dtype=np.float32)
    dataset, store = make(tmp_path, ["a", "b"], {"q": {"b": 1, "lost": 1}}, corpus)
    with pytest.raises(InputError, match="found lost, which is not there"):
        evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1]))
    dataset.qrels["q"].pop("lost")
    with pytest.raises(InputError, match=r"expected query vectors \[1, 8\] .* found \[1, 5\]"):
        evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1, :5]))
    with pytest.raises(InputError, match="NaN"):
        evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1] * np.nan))
    with pytest.raises(ValueError, match="k: expected at least 1"):
        evaluate_beir(dataset, store=store, embed_queries=embedder(corpus[:1]), k=0)


@pytest.mark.parametrize("questions", [0, 1, 7, 8])
def test_search_in_batches_equals_one_search(monkeypatch: pytest.MonkeyPatch, questions: int) -> None:
    monkeypatch.setattr(approximate, "QUERY_BATCH", 4)
    told: list[int] = []

    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return queries[:, :k], np.broadcast_to(np.arange(k), (len(queries), k))

    queries = unit(np.random.default_rng(0), questions)
    for found, whole in zip(search_by_parts(find, told.append)(queries, 3), find(queries, 3), strict=True):
        np.testing.assert_array_equal(found, whole)
    assert sum(told) == questions
