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
from retriever.config.model import ModelConfig
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
        (lambda w: retriever.load(w.model, precision="fp8"), "precision: expected one of auto, fp32, bf16, fp16"),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, p: retriever.load(None), "model: expected a file or folder, found None"),
        (lambda w, p: retriever.load(w.model, device=3), "device: expected auto, cpu, cuda"),
        (lambda w, p: retriever.load(w.model, micro_batch_tokens=1.5), "micro_batch_tokens: expected a whole number"),
        (lambda w, p: retriever.load(w.model, progress=3), "progress: expected a function of one ProgressEvent"),
        (lambda w, p: retriever.encode(w.model, "", p), "data: expected a file or folder, found ''"),
        (lambda w, p: retriever.encode(w.model, p / "no", p), "no such file or folder"),
        (lambda w, p: retriever.encode(w.model, w.beir, p, shard_rows="3"), "shard_rows: expected a whole number"),
        (lambda w, p: retriever.search(w.model, w.index, 3), "queries: expected a text or texts, found int"),
        (lambda w, p: retriever.search(w.model, w.index, "\ud800"), "query 1: expected text, found the lone surrogate"),
        (lambda w, p: retriever.search(w.model, w.index, {1: "a"}), "queries: expected ids that are text, found 1"),
        (lambda w, p: retriever.search(w.model, None, "red"), "index: expected a file or folder, found None"),
        (lambda w, p: retriever.search(w.model, [], "red"), "index: expected at least one index, found none"),
        (lambda w, p: retriever.build_index(3, p), "store: expected a file or folder, found 3"),
        (lambda w, p: retriever.build_index(w.embeddings, p, part="1/2"), "part: expected two numbers"),
        (lambda w, p: retriever.build_index(w.embeddings, p, seed=1.5), "seed: expected a whole number, found 1.5"),
        (lambda w, p: retriever.build_index(w.embeddings, p, target_recall="a"), "target_recall: expected a number"),
        (lambda w, p: retriever.evaluate(w.model, 3), "data: expected a file or folder, found 3"),
        (lambda w, p: retriever.evaluate(w.model, w.beir, mirror="x"), "mirror: expected together with download"),
        (lambda w, p: retriever.evaluate(w.model, w.beir, out=w.pairs), "out: expected a folder, found the file"),
        (lambda w, p: retriever.evaluate(w.model, w.beir, out=""), "out: expected a file or folder, found ''"),
        (lambda w, p: retriever.compare({"a": 3}, w.beir), "systems: expected a file or folder, found 3"),
        (lambda w, p: retriever.compare(w.beir, w.beir, weights=[1]), "weights: expected together with fuse"),
        (lambda w, p: retriever.compare(w.beir, w.beir, bm25_stopwords="de"), "bm25_stopwords: expected together"),
        (lambda w, p: retriever.mine(w.model, w.beir, p), "out: expected a .jsonl file"),
        (lambda w, p: retriever.mine(w.model, w.beir, p / "a.jsonl", max_share="a"), "max_share: expected a number"),
        (lambda w, p: retriever.split(None, p / "s"), "source: expected a file or folder, found None"),
        (lambda w, p: retriever.split(w.pairs, p / "s", seed="x"), "seed: expected a whole number, found 'x'"),
        (lambda w, p: retriever.split(w.pairs, p / "s", format="xml"), "format: expected one of auto"),
        (lambda w, p: retriever.train(3), "config: expected a file, a TrainConfig or a mapping, found int"),
        (lambda w, p: retriever.train(resume=3), "resume: expected a file or folder, found 3"),
        (lambda w, p: retriever.zero_shot(w.model, None), "data: expected a file or folder, found None"),
    ],
)
def test_arguments_of_wrong_types_are_named_on_one_line(world: World, tmp_path: Path, call, message: str) -> None:
    with pytest.raises(retriever.InputError) as refused:
        call(world, tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_images_are_a_list(world: World) -> None:
    model = retriever.load(world.model)
    with pytest.raises(TypeError, match="images: expected a list of files or images, found one str"):
        model.encode_images("red.png")
    with pytest.raises(TypeError, match=r"images\[0\]: expected a file or an image, found int"):
        model.encode_images(number for number in (3,))


def test_a_report_is_not_saved_within_itself_or_over_a_file(world: World, tmp_path: Path) -> None:
    report = retriever.evaluate(world.model, world.beir, out=tmp_path / "report")
    with pytest.raises(retriever.InputError, match="expected a folder outside the report"):
        report.save(tmp_path / "report" / "copy")
    with pytest.raises(retriever.InputError, match="expected a new or empty folder, found a file"):
        report.save(world.pairs)
    assert str(tmp_path / "report") in repr(report.folder)
    compared = retriever.compare(tmp_path / "report", world.beir, bm25=True, fuse="report+BM25", permutations=10)
    assert len(compared.metrics["words"]) == 3


def test_a_run_without_a_dev_set_has_no_best_step(tiny: ModelConfig, tmp_path: Path) -> None:
    source = SourceConfig(str(write_pairs(tmp_path / "pairs.jsonl")), query="question", positive="answer")
    run = retriever.train(
        {"model": tiny, "data": {"sources": [source]}}, out=str(tmp_path / "run"), steps=1, batch_size=8
    )
    assert run.best_score is None and run.best_step is None
