"""`retriever mine` and `retriever score` take any source, continue after an interruption, and agree with each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cli_helpers import MEANINGS, assert_refused, command, write_beir, write_lines
from forks import LoadedPython, torchrun
from huggingface_hub import constants
from tiny_model import tiny_cross_encoder

import retriever
from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.model import Model
from retriever.mining import mine as mine_module
from retriever.mining import parts
from retriever.mining.cross_encoder import CrossEncoderScorer
from retriever.models.modality import build_towers


@pytest.fixture(scope="module")
def model(tiny: Any) -> Model:
    torch.manual_seed(0)
    return Model("tiny", build_towers(tiny).eval(), EncodeOptions())


@pytest.fixture(scope="module")
def cross_encoder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cross_encoder(tiny.tokenizer, tmp_path_factory.mktemp("cross_encoder")))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "pairs.jsonl", [{"query": f"what is a {word}", "positive": text} for word, text in MEANINGS.items()]
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_mined_in_the_union_of_their_passages(model: Model, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "hard.jsonl"
    result = retriever.mine(model, pairs, out, negatives=3, max_share=None)
    mined = rows(out)
    assert (result.queries, result.with_fewer_negatives) == (20, 0)
    passages = list(MEANINGS.values())
    scores = model.encode_queries([row["query"] for row in mined]) @ model.encode_passages(passages).T
    for i, row in enumerate(mined):
        ranked = [j for j in np.argsort(-scores[i]) if j != i][:3]
        assert row["positive"] == [passages[i]] and row["negatives"] == [passages[j] for j in ranked]
        np.testing.assert_allclose(row["scores"], scores[i, [i, *ranked]], atol=1e-5)
    assert not (tmp_path / "hard.jsonl.work").exists()

    # A corpus of other passages, through an index of them, gives its passages; exact scores come from the store.
    beir = write_beir(tmp_path / "words")
    store = retriever.encode(model, beir, tmp_path / "store")
    retriever.build_index(store, tmp_path / "index", factory="Flat")
    exact, found = tmp_path / "exact.jsonl", tmp_path / "found.jsonl"
    retriever.mine(model, pairs, exact, corpus=beir, negatives=3, max_share=None, embeddings=tmp_path / "store")
    for embeddings in (tmp_path / "store", None):
        retriever.mine(
            model, pairs, found, index=tmp_path / "index", negatives=3, max_share=None, embeddings=embeddings
        )
        for one, other in zip(rows(found), rows(exact), strict=True):
            assert one["negatives"] == other["negatives"] and one["negatives"][0] not in passages
            np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)

    # The scores of the same model are those of the mined file.
    scored = retriever.score(model, exact, tmp_path / "scored.jsonl")
    assert (scored.rows, scored.pairs) == (20, 80)
    for one, other in zip(rows(scored.path), rows(exact), strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)
        assert {**one, "scores": 0} == {**other, "scores": 0}


def test_an_interrupted_command_continues(
    model: Model, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MIN_PART_ROWS", 1)
    out, whole = tmp_path / "hard.jsonl", tmp_path / "whole.jsonl"
    retriever.mine(model, pairs, whole, sampling="random", negatives=2)
    mine_rows, mined = mine_module.Miner.mine, []

    def interrupted(self: Any, table: Any, start: int, *rest: Any) -> Any:
        if len(mined) == 2:
            raise KeyboardInterrupt
        mined.append(start)
        return mine_rows(self, table, start, *rest)

    with mock.patch.object(mine_module.Miner, "mine", interrupted), pytest.raises(KeyboardInterrupt):
        retriever.mine(model, pairs, out, sampling="random", negatives=2)
    assert not out.exists() and len(mined) == 2

    def counted(self: Any, table: Any, start: int, *rest: Any) -> Any:
        assert start not in mined
        return mine_rows(self, table, start, *rest)

    with mock.patch.object(mine_module.Miner, "mine", counted):
        retriever.mine(model, pairs, out, sampling="random", negatives=2)
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "hard.jsonl.work").exists()

    # A damaged part is not used, and a folder of someone else is not removed.
    with mock.patch.object(mine_module.Miner, "mine", interrupted), pytest.raises(KeyboardInterrupt):
        mined.clear()
        retriever.mine(model, pairs, out, sampling="random", negatives=2)
    (damaged,) = (tmp_path / "hard.jsonl.work").glob("parts-*/00000.jsonl")
    damaged.write_text(damaged.read_text().replace("a", "e"))
    with pytest.raises(InputError, match=r"00000\.jsonl: damaged"):
        retriever.mine(model, pairs, out, sampling="random", negatives=2)
    (tmp_path / "other.jsonl.work").mkdir()
    with pytest.raises(InputError, match=r"other\.jsonl\.work: expected no such folder"):
        retriever.mine(model, pairs, tmp_path / "other.jsonl")


def test_a_cross_encoder_scores_candidates_and_pairs(
    model: Model, cross_encoder: str, pairs: Path, tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    mined = retriever.mine(
        model, pairs, tmp_path / "hard.jsonl", cross_encoder=cross_encoder, negatives=4, depth=10, max_share=1.0
    )
    reference = CrossEncoder(cross_encoder, device="cpu")
    for row in rows(mined.path):
        texts = [(row["query"], text) for text in (*row["positive"], *row["negatives"])]
        np.testing.assert_allclose(row["scores"], reference.predict(texts, show_progress_bar=False), atol=1e-5)
        assert row["scores"][1:] == sorted(row["scores"][1:], reverse=True)
        assert max(row["scores"]) == row["scores"][0]
    outcome = command(
        "score", "--model", cross_encoder, "--data", mined.path, "--out", tmp_path / "s.jsonl", "--logits", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["rows"] == 20
    for row, before in zip(rows(tmp_path / "s.jsonl"), rows(mined.path), strict=True):
        np.testing.assert_allclose(1 / (1 + np.exp(-np.array(row["scores"]))), before["scores"], atol=1e-5)


def test_prompts_of_rows_and_invalid_arguments(model: Model, pairs: Path, tmp_path: Path) -> None:
    prompted = write_lines(
        tmp_path / "prompted.jsonl",
        [{**row, "kind": "search: " if i % 2 else None} for i, row in enumerate(rows(pairs))],
    )
    source = SourceConfig(str(prompted), query_prompt_column="kind", passage_prompt="text: ")
    mined = retriever.mine(model, source, tmp_path / "hard.jsonl", negatives=1, max_share=None)
    written = rows(mined.path)
    assert [row["kind"] for row in written] == [None, "search: "] * 10
    queries = model.encode_queries([(row["kind"] or "") + row["query"] for row in written])
    passages = [
        model.encode_passages([f"text: {text}" for text in (*row["positive"], *row["negatives"])]) for row in written
    ]
    for row, query, vectors in zip(written, queries, passages, strict=True):
        np.testing.assert_allclose(row["scores"], vectors @ query, atol=1e-5)
    assert not model.towers.prompt("document")
    again = retriever.score(
        model, SourceConfig(str(mined.path), query_prompt_column="kind", passage_prompt="text: "), tmp_path / "s.jsonl"
    )
    for one, other in zip(rows(again.path), written, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)

    arguments = ("mine", "--model", "m", "--data", pairs, "--out", tmp_path / "x.jsonl")
    for flags, message in (
        (("--max-share", "1.5"), "max.share: expected more than 0"),
        (("--index", "i", "--corpus", "c"), "corpus: leave it out"),
        (("--keep-top", "0"), "keep.top: expected at least 1"),
        (("--negatives", "-1"), "negatives: expected at least 0"),
    ):
        assert_refused(command(*arguments, *flags), 2, message)
    assert_refused(command("score", "--model", "a/b", *arguments[3:]), 2, "kind: expected cross-encoder or bi-encoder")
    for work in (retriever.mine, retriever.score):
        with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
            work(model, tmp_path / "none.jsonl", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl.work").exists()


@pytest.mark.slow
def test_several_processes_write_the_file_of_one(model: Model, pairs: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "together.jsonl"
    folder.mkdir()
    model.towers.save(folder)
    many = write_lines(tmp_path / "many.jsonl", [row for number in range(200) for row in rows(pairs)])
    flags = ("--model", folder, "--data", many, "--negatives", "2", "--sampling", "random", "--out")
    alone = command("mine", *flags, tmp_path / "alone.jsonl")
    assert alone.code == 0, alone.err
    with LoadedPython() as python:
        done = python.run(*torchrun(2, "-m", "retriever", "mine", *flags, out))
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
        scored = ("score", "--model", folder, "--data", out, "--out", tmp_path / "scored.jsonl")
        done = python.run(*torchrun(2, "-m", "retriever", *scored))
    assert done.returncode == 0, done.stderr
    for one, other in zip(rows(tmp_path / "scored.jsonl"), rows(out), strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)


def test_a_cross_encoder_is_loaded_from_the_hub_at_a_revision(
    cross_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--acme--ranker"
    shutil.copytree(cross_encoder, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pairs = [("what is a cat?", "an animal"), ("define oak", "a tree")]
    expected = CrossEncoderScorer(cross_encoder, "cpu").scores(pairs)
    for revision in ("v1", "a" * 40):
        np.testing.assert_array_equal(CrossEncoderScorer(f"acme/ranker@{revision}", "cpu").scores(pairs), expected)
    for name in ("acme/ranker@v2", "acme/none"):
        with pytest.raises(InputError, match=f"^{name}: no such folder, and not in the cache of the hub.*offline"):
            CrossEncoderScorer(name, "cpu")


@pytest.mark.gpu
def test_mining_on_a_gpu_equals_mining_on_the_host(tiny: Any, cross_encoder: str, pairs: Path, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Model("tiny", build_towers(tiny).eval().to(device), EncodeOptions())
        for name in (None, cross_encoder):
            out = tmp_path / f"{device}-{name is None}.jsonl"
            retriever.mine(model, pairs, out, negatives=3, max_share=None, cross_encoder=name)
            found.append(rows(out))
    for one, other in zip(found[:2], found[2:], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_allclose(mine["scores"], theirs["scores"], atol=1e-4)
            assert mine["positive"] == theirs["positive"]
