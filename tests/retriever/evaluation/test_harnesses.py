"""A trained model folder scores the same in beir and mteb, the harnesses of published results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command, write_config

MEASURES = ("ndcg", "map", "recall", "precision")
KINDS: dict[str, dict[str, Any]] = {
    "one tower": {},
    "prompts": {"query_prompt": "ask: ", "passage_prompt": "text: "},
    "two towers": {"shared": False},
    "two towers, prompts": {"shared": False, "query_prompt": "ask: ", "passage_prompt": "text: "},
}


@dataclass(frozen=True)
class Trained:
    """A trained model folder, the report of our evaluation, and its metrics."""

    model: Path
    report: Path
    means: dict[str, float]


@pytest.fixture(scope="module", params=KINDS)
def ours(request: Any, world: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Models whose queries and passages are encoded alike, with different prompts, or with different towers."""
    folder = tmp_path_factory.mktemp("harness")
    model = world.model
    if fields := KINDS[request.param]:
        config = write_config(folder / "run.yaml", replace(tiny, **fields), world.pairs)
        trained = command("train", config)
        assert trained.code == 0, trained.err
        model = folder / "run" / "model"
    outcome = command("evaluate", "beir", "--model", model, "--data", world.beir, "--out", folder / "report", "--json")
    assert outcome.code == 0, outcome.err
    means: dict[str, float] = json.loads(outcome.out)["sets"]["words"]["mean"]
    assert 0.2 < means["ndcg@10"] < 0.999  # neither random nor perfect
    return Trained(model, folder / "report", means)


def test_mteb_gives_the_same_metrics(world: Any, ours: Trained, tmp_path: Path) -> None:
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    from index.beir import BeirDataset

    data = BeirDataset.open(world.beir)

    class Words(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Words",
            description="A local folder.",
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

    model = SentenceTransformer(str(ours.model), device="cpu")
    cache = mteb.cache.ResultCache(tmp_path)
    result = mteb.evaluate(model, Words(), cache=cache, show_progress_bar=False, co2_tracker=False)
    theirs = result.task_results[0].scores["test"][0]
    for measure in MEASURES:
        for k in (1, 3, 5, 10, 100):
            # mteb rounds to five digits.
            assert ours.means[f"{measure}@{k}"] == pytest.approx(theirs[f"{measure}_at_{k}"], abs=1.1e-5), (measure, k)
    # The file that the report has for mteb is one, with the same scores.
    saved = mteb.results.TaskResult.from_disk(ours.report / "mteb" / "words.json").scores["test"][0]
    for name in ("main_score", "ndcg_at_10", "recall_at_100", "mrr_at_10"):
        assert saved[name] == pytest.approx(theirs[name], abs=1.1e-5), name


def test_the_beir_package_gives_the_same_metrics(world: Any, ours: Trained) -> None:
    from beir.datasets.data_loader import GenericDataLoader
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch
    from sentence_transformers import SentenceTransformer

    from eval.beir_model import BeirModel

    corpus, queries, qrels = GenericDataLoader(str(world.beir)).load("test")
    search = DenseRetrievalExactSearch(BeirModel(SentenceTransformer(str(ours.model), device="cpu")))
    harness = EvaluateRetrieval(search, score_function="dot")
    run = harness.retrieve(corpus, queries)
    capped = harness.evaluate_custom(qrels, run, harness.k_values, "r_cap")
    for theirs in (*harness.evaluate(qrels, run, harness.k_values), capped):
        for name, value in theirs.items():
            measure, _, k = name.partition("@")
            key = {"P": "precision", "R_cap": "rcap"}.get(measure, measure.lower())
            assert ours.means[f"{key}@{k}"] == pytest.approx(value, abs=1.1e-5), name
