"""The public Python API does what the command line does, without printing."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import World, write_beir, write_pairs

import retriever
from retriever.config.run import ModelConfig
from retriever.config.sources import SourceConfig


def test_every_public_name_is_documented_and_typed() -> None:
    for name in retriever.__all__:
        public = getattr(retriever, name)
        if name == "__version__":
            continue
        assert inspect.getdoc(public), name
        if inspect.isfunction(public):
            assert all(
                p.annotation is not inspect.Parameter.empty for p in inspect.signature(public).parameters.values()
            )
            documented = inspect.getdoc(public) or ""
            for parameter in inspect.signature(public).parameters:
                assert f"{parameter}:" in documented, f"{name}({parameter})"


def test_a_model_gives_the_vectors_of_the_command(world: World) -> None:
    model = retriever.load(world.model)
    store = retriever.EmbeddingStore.open(world.embeddings)
    passages = [{"title": passage.title, "text": passage.text} for passage in store.passages()]
    np.testing.assert_array_equal(model.encode_passages(passages), store.vectors())
    assert model.dimension == store.dim and "dimension" in repr(model)


def test_a_notebook_trains_encodes_indexes_searches_and_evaluates(
    tiny: ModelConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="retriever")
    pairs, beir = write_pairs(tmp_path / "pairs.jsonl"), write_beir(tmp_path / "words")
    events: list[retriever.ProgressEvent] = []
    run = retriever.train(
        {
            "model": tiny,
            "data": {"sources": [SourceConfig(str(pairs), query="question", positive="answer", negatives="wrong")]},
            "out": str(tmp_path / "run"),
        },
        batch_size=8,
        steps=3,
        lr=1e-3,
        progress=events.append,
    )
    assert run.step == 3 and run.metrics[-1]["step"] == 3 and run.model_folder.is_dir()
    assert [event.done for event in events if event.task == "train" and event.unit == "steps"][-1] == 3
    model = retriever.load(run.model_folder)
    store = retriever.encode(model, beir, tmp_path / "embeddings")
    index = retriever.build_index(store, str(tmp_path / "index"))
    scores, ids = index.search(model.encode_queries(["red", "two"]), k=3)
    assert scores.shape == ids.shape == (2, 3) and set(ids.ravel()) <= set(store.ids())
    answers = retriever.search(model, index, ["red", "two"], k=3)
    assert [[result.id for result in answer.results] for answer in answers] == ids.tolist()
    report = retriever.evaluate(model, beir)
    assert 0 <= report.metrics["ndcg@10"] <= 1
    assert report.per_query["ndcg@10"].mean() == pytest.approx(report.metrics["ndcg@10"])
    saved = report.save(tmp_path / "report")
    assert json.loads((saved / "evaluation.json").read_text())["sets"]["words"]["mean"] == report.metrics
    mined = retriever.mine(model, beir, tmp_path / "hard.jsonl", split="test", negatives=2)
    assert mined.queries == len((tmp_path / "hard.jsonl").read_text().splitlines())
    compared = retriever.compare({"a": saved, "b": saved}, beir, permutations=10)
    assert compared.metrics["words"]["a"] == compared.metrics["words"]["b"]
    out, err = capfd.readouterr()
    assert out == err == "", "library code prints nothing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: retriever.load(w.model, precision="fp8"), "precision: expected one of fp32, bf16, fp16"),
        (lambda w: retriever.encode(w.model, w.beir, "x", shard_rows=0), "shard_rows: expected at least 1, found 0"),
        (lambda w: retriever.search(w.model, w.index, [" "]), "query 1: expected text, found none"),
        (lambda w: retriever.search(w.model, w.index, "red", k=0), "k: expected at least 1, found 0"),
        (lambda w: retriever.train(name="x"), "name: expected the field of one section"),
        (lambda w: retriever.train(batchsize=4), "unknown key; did you mean 'batch_size'?"),
        (lambda w: retriever.build_index(w.embeddings, "x", target_recall=2), "target_recall: expected more than 0"),
        (lambda w: retriever.evaluate(w.model, w.beir, factory="Flat", index=w.index), "factory: give a factory"),
    ],
)
def test_invalid_arguments_are_named(world: World, call, message: str) -> None:
    with pytest.raises(retriever.ConfigError, match=message.replace("?", r"\?")):
        call(world)


def test_one_string_is_not_a_list_of_texts(world: World) -> None:
    model = retriever.load(world.model)
    with pytest.raises(TypeError, match="queries: expected a list of texts"):
        model.encode_queries("red")
    with pytest.raises(TypeError, match=r"passages\[1\]: expected text"):
        model.encode_passages(["a", 3])
