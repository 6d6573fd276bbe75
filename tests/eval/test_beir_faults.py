"""Faults of the beir package (2.2.0), reproduced by running it, and the behavior of this package."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beir.datasets.data_loader import GenericDataLoader
from beir.retrieval.evaluation import EvaluateRetrieval
from beir.retrieval.search.dense import DenseRetrievalExactSearch

from eval.evaluate import evaluate_beir
from eval.metrics import evaluate_run
from eval.ranking import RankedRun
from eval.sets.preflight import preflight
from index.beir import BeirDataset
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

QRELS = "query-id\tcorpus-id\tscore\nq1\tb\t1\n"


def folder_of(tmp_path: Path, qrels: str = QRELS, ids: str = "abc") -> Path:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": id_, "title": "", "text": f"text {n}"}) for n, id_ in enumerate(ids)]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "one"}\n{"_id": "q2", "text": "two"}\n')
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def store_of(folder: Path, vectors: np.ndarray) -> EmbeddingStore:
    with EmbeddingWriter(folder.parent / "store", dim=vectors.shape[1], model={"m": "m"}, source={}) as writer:
        writer.append(list(BeirDataset.open(folder).passages()), vectors)
    return EmbeddingStore.open(folder.parent / "store")


class Embedded:
    """A model with fixed embeddings."""

    def __init__(self, corpus: np.ndarray, queries: np.ndarray) -> None:
        self._corpus, self._queries = torch.from_numpy(corpus), torch.from_numpy(queries)

    def encode_queries(self, texts: list[str], **options: Any) -> torch.Tensor:
        return self._queries

    def encode_corpus(self, corpus: list[dict[str, str]], **options: Any) -> torch.Tensor:
        return self._corpus[[int(passage["text"].split()[-1]) for passage in corpus]]


def beir_search(folder: Path, corpus: np.ndarray, queries: np.ndarray, k: int) -> dict[str, dict[str, float]]:
    logging.disable()
    texts, asked, _ = GenericDataLoader(str(folder)).load("test")
    return DenseRetrievalExactSearch(Embedded(corpus, queries)).search(texts, asked, k, "dot")


def test_one_query_is_searched(tmp_path: Path) -> None:
    folder, vectors = folder_of(tmp_path), np.eye(3, dtype=np.float32)
    with pytest.raises(IndexError):
        beir_search(folder, vectors, vectors[:1], 2)
    dataset = BeirDataset.open(folder)
    run, _ = evaluate_beir(dataset, store=store_of(folder, vectors), embed_queries=lambda texts: vectors[1:2], k=2)
    assert next(iter(run["q1"])) == "b"


def test_nan_is_refused_and_not_ranked_as_minus_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, QRELS + "q2\ta\t1\n")
    corpus = np.array([[1.0, 0], [-3, 0], [np.nan, 0]], np.float32)
    queries = np.array([[1.0, 0], [1, 0]], np.float32)
    assert beir_search(folder, corpus, queries, 3)["q1"]["c"] == -1.0  # above b, which scores -3
    with pytest.raises(InputError, match=r"row 2, passage 'c': expected a finite vector, found NaN"):
        store_of(folder, corpus)
    with pytest.raises(InputError, match="query q1, passage c, found NaN"):
        evaluate_run({"q1": {"b": 1}}, {"q1": {"c": math.nan}})


def test_row_minus_one_of_an_index_is_not_a_passage() -> None:
    rows, scores = np.array([[1, -1]]), np.array([[0.5, -np.inf]], np.float32)
    ids = ["a", "b", "last"]
    assert [ids[row] for row in rows[0]] == ["b", "last"]  # beir indexes the ids with faiss's -1
    assert RankedRun(["q"], ids, rows, scores) == {"q": {"b": 0.5}}


def test_the_first_judgement_counts_without_a_header(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "q1\tb\t1\nq2\ta\t1\n")
    logging.disable()
    assert GenericDataLoader(str(folder)).load("test")[2] == {"q2": {"a": 1}}
    assert BeirDataset.open(folder).qrels == {"q1": {"b": 1}, "q2": {"a": 1}}


def test_duplicate_ids_are_refused_and_do_not_overwrite(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ids="aba")
    logging.disable()
    assert GenericDataLoader(str(folder)).load("test")[0]["a"]["text"] == "text 2"
    with pytest.raises(InputError, match=r"corpus\.jsonl:3: expected each passage id once, found a again"):
        preflight(folder).refuse()


def test_missing_queries_count_as_zero_in_every_measure() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    run = {"q1": {"a": 1.0}}
    ndcg, *_ = EvaluateRetrieval.evaluate(qrels, run, [10])
    mrr = EvaluateRetrieval.evaluate_custom(qrels, run, [10], "mrr")
    assert (ndcg["NDCG@10"], mrr["MRR@10"]) == (1.0, 0.5)  # the two measures treat the missing query differently
    ours = evaluate_run(qrels, run, (10,))
    assert {value for name, value in ours.mean.items() if not name.startswith("precision")} == {0.5}
    assert ours.missing == ["q2"]


def test_all_measures_break_ties_by_id() -> None:
    qrels, run = {"q": {"b": 1}}, {"q": {"a": 1.0, "b": 1.0}}
    ndcg, *_ = EvaluateRetrieval.evaluate(qrels, run, [1])
    mrr = EvaluateRetrieval.evaluate_custom(qrels, run, [1], "mrr")
    assert (ndcg["NDCG@1"], mrr["MRR@1"]) == (1.0, 0.0)  # ties by id, and by dictionary order
    assert {value for value in evaluate_run(qrels, run, (1,)).mean.values()} == {1.0}


def test_capped_recall_of_a_query_without_relevant_passages_is_zero() -> None:
    qrels = {"q": {"a": 0}, "p": {"a": 1}}
    run = {"q": {"a": 1.0}, "p": {"a": 1.0}}
    with pytest.raises(ZeroDivisionError):
        EvaluateRetrieval.evaluate_custom(qrels, run, [1], "r_cap")
    assert evaluate_run(qrels, run, (1,)).mean["rcap@1"] == 0.5


def test_a_judged_passage_with_its_querys_id_counts() -> None:
    qrels, run = {"1": {"1": 1}}, {"1": {"1": 2.0, "2": 1.0}}
    ndcg, *_ = EvaluateRetrieval.evaluate(qrels, {query: dict(scores) for query, scores in run.items()}, [10])
    assert ndcg["NDCG@10"] == 0.0
    assert evaluate_run(qrels, run, (10,)).mean["ndcg@10"] == 1.0


@pytest.fixture(autouse=True)
def _restore_logging() -> Any:
    yield
    logging.disable(logging.NOTSET)
