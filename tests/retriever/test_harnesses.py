"""A trained model folder scores the same in the harnesses that others publish with: beir and mteb, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command

MEASURES = ("ndcg", "map", "recall", "precision")


@pytest.fixture(scope="module")
def ours(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Our own numbers of the trained folder."""
    out = tmp_path_factory.mktemp("harness")
    outcome = command("evaluate", "beir", "--model", world.model, "--data", world.beir, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    means: dict[str, float] = json.loads(outcome.out)["words"]
    assert 0.2 < means["ndcg@10"] < 0.999  # neither failing nor trivial
    return means


def test_mteb_gives_our_numbers(world: Any, ours: dict[str, float], tmp_path: Path) -> None:
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    from eval.beir import BeirDataset

    data = BeirDataset.open(world.beir)

    class Words(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Words",
            description="A folder on this disk.",
            dataset={"path": "local/words", "revision": "1"},
            type="Retrieval",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **options: Any) -> None:
            self.corpus = {"test": {p.id: {"title": p.title, "text": p.text} for p in data.passages()}}
            self.queries, self.relevant_docs = {"test": data.queries}, {"test": data.qrels}
            self.data_loaded = True

    model = SentenceTransformer(str(world.model), device="cpu")
    cache = mteb.cache.ResultCache(tmp_path)
    found = mteb.evaluate(model, Words(), cache=cache, show_progress_bar=False, co2_tracker=False)
    theirs = found.task_results[0].scores["test"][0]
    for measure in MEASURES:
        for k in (1, 3, 5, 10, 100):
            # mteb rounds to five digits.
            assert ours[f"{measure}@{k}"] == pytest.approx(theirs[f"{measure}_at_{k}"], abs=1.1e-5), (measure, k)


def test_the_beir_package_gives_our_numbers(world: Any, ours: dict[str, float]) -> None:
    from beir.datasets.data_loader import GenericDataLoader
    from beir.retrieval import models
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    corpus, queries, qrels = GenericDataLoader(str(world.beir)).load("test")
    search = DenseRetrievalExactSearch(models.SentenceBERT(str(world.model)))
    harness = EvaluateRetrieval(search, score_function="dot")
    found = harness.retrieve(corpus, queries)
    capped = harness.evaluate_custom(qrels, found, harness.k_values, "r_cap")
    for theirs in (*harness.evaluate(qrels, found, harness.k_values), capped):
        for name, value in theirs.items():
            measure, _, k = name.partition("@")
            key = {"P": "precision", "R_cap": "rcap"}.get(measure, measure.lower())
            assert ours[f"{key}@{k}"] == pytest.approx(value, abs=1.1e-5), name
