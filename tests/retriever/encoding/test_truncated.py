"""Embeddings truncated to their first values: models, stores, indexes, search and evaluation by dimension."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import MEANINGS, assert_refused, command, write_lines
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

import retriever
from index.store.prefix import truncated, unit_prefix
from retriever.models.towers import Towers

DIM = 12
TEXTS = [f"{word}: {meaning}" for word, meaning in MEANINGS.items()]


def test_models_and_stores_truncate_as_sentence_transformers_does(world: Any, tmp_path: Path) -> None:
    model = retriever.load(world.model, dim=DIM, device="cpu")
    theirs = SentenceTransformer(str(world.model), device="cpu", truncate_dim=DIM)
    expected = theirs.encode_document(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(model.encode_passages(TEXTS), expected, atol=1e-6)
    assert model.dimension == DIM and "dimension=12 of 32" in repr(model)
    store = retriever.encode(retriever.load(world.model), world.beir, tmp_path / "store", dim=DIM)
    full = retriever.EmbeddingStore.open(world.embeddings)
    prefix = truncated(full, DIM)
    assert store.dim == prefix.dim == DIM and store.model == prefix.model == {**full.model, "dim": str(DIM)}
    for (first, ours), (_, computed) in zip(prefix.shards(), store.shards(), strict=True):
        assert first == 0 and ours.dtype == computed.dtype == np.float32
        np.testing.assert_allclose(ours, computed, atol=1e-6)
    # Everything else of a model's own dimension is unchanged.
    whole = retriever.load(world.model, dim=32)
    assert whole.towers.fingerprint() == full.model and truncated(full, 32) is full


def test_an_index_of_truncated_embeddings_takes_queries_of_its_dimension_only(world: Any, tmp_path: Path) -> None:
    index = tmp_path / "index"
    built = command("index", "build", "--embeddings", world.embeddings, "--out", index, "--dim", DIM, "--json")
    assert built.code == 0 and json.loads(built.out)["dim"] == DIM
    assert json.loads((index / "manifest.json").read_text())["model"]["dim"] == str(DIM)
    search = ("search", "--model", world.model, "--index")
    found = command(*search, index, "--dim", DIM, "--json", "small bird")
    assert found.code == 0, found.err
    vectors = retriever.load(world.model).encode_queries(["small bird"])
    passages = unit_prefix(retriever.EmbeddingStore.open(world.embeddings).vectors(), DIM)
    scores = np.sort((passages @ unit_prefix(vectors, DIM).T)[:, 0])[::-1]
    answers = json.loads(found.out)["results"]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores[:10], atol=1e-6)
    assert_refused(command(*search, index, "cat"), 1, "first 12 dimensions.*found embeddings of all dimensions")
    assert_refused(command(*search, world.index, "--dim", DIM, "cat"), 1, "of all dimensions.*found.*first 12")
    assert_refused(command(*search, index, "--dim", 8, "cat"), 1, "first 12 dimensions.*first 8")
    assert_refused(command(*search, index, "--dim", 33, "cat"), 1, "dim: expected a number from 1 to 32")
    # Full embeddings are truncated as those of the index when they are added.
    corpus = write_lines(tmp_path / "more.jsonl", [{"_id": "new", "text": "small bird"}])
    retriever.encode(world.model, corpus, tmp_path / "more")
    assert command("index", "add", index, "--embeddings", tmp_path / "more").code == 0
    best = retriever.search(world.model, index, "small bird", k=1, dim=DIM)[0].results[0]
    assert best.id == "new" and best.score == pytest.approx(1, abs=1e-6)


def test_evaluation_gives_one_table_for_all_dimensions(world: Any, tmp_path: Path) -> None:
    arguments = ["--model", world.model, "--data", world.beir, "--out", tmp_path / "out", "--dims", 4, DIM, 32]
    outcome = command("evaluate", "beir", *arguments)
    assert outcome.code == 0, outcome.err
    rows = [line.split(" | ") for line in outcome.out.splitlines() if " | float32 | " in line]
    assert [row[0] for row in rows] == ["| 32", "| 12", "| 4"] and [row[2] for row in rows] == ["128", "48", "16"]
    found = retriever.evaluate(world.model, world.beir, dims=[DIM, 32])
    alone = retriever.evaluate(world.model, world.beir, dim=DIM)
    name = next(iter(found.sets))
    assert found.by_dim[DIM][name].metrics == alone.metrics
    assert found.by_dim[32][name].metrics == found.metrics
    assert rows[1][3] == f"{alone.metrics['ndcg@10']:.4f}"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## By size of the embeddings" in report and "\n".join(map(" | ".join, rows[:1])) in report
    assert "By size of the embeddings" in (tmp_path / "out" / "report.html").read_text()
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(evaluation["sets"][name]["by dimension"]) == ["4", "12", "32"]
    assert (tmp_path / "out" / name / "dim-12.trec").exists()
    with pytest.raises(retriever.ConfigError, match="dims: expected at most 32 dimensions, found 33"):
        retriever.evaluate(world.model, world.beir, dims=[33])


def test_embeddings_without_unit_length_are_not_truncated(world: Any, tmp_path: Path) -> None:
    model = SentenceTransformer(str(world.model), device="cpu")
    assert isinstance(model[-1], Normalize)
    dot = SentenceTransformer(modules=list(model)[:-1], device="cpu", similarity_fn_name="dot")
    towers = Towers(dot).eval()
    with pytest.raises(retriever.InputError, match="dim: expected a model of embeddings of unit length"):
        towers.truncated(DIM)
    dot.save(str(tmp_path / "dot"), create_model_card=False)
    store = retriever.encode(str(tmp_path / "dot"), world.beir, tmp_path / "store")
    with pytest.raises(retriever.InputError, match="expected vectors of unit length"):
        truncated(store, DIM)
