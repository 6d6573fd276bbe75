"""Sets of NanoBEIR and ir_datasets by name, and results as files of MTEB."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from cli_helpers import World, assert_refused, command
from huggingface_hub import constants

from eval.sets.external import NANO, external_names
from index.beir import BeirDataset

Document = namedtuple("Document", "doc_id title text")


class Query(SimpleNamespace):
    def default_text(self) -> str:
        return self.text


def evaluate(world: World, tmp_path: Path, *words: object) -> Any:
    arguments = ("--model", world.model, "--home", tmp_path / "home", "--out", tmp_path / "report", *words)
    return command("evaluate", "beir", *arguments)


def test_a_set_of_nanobeir_is_downloaded_and_evaluated(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot_download(repo: str, *, local_dir: Path, **options: Any) -> None:
        asked.append(repo)
        assert options["repo_type"] == "dataset"
        shutil.copytree(world.beir, local_dir, dirs_exist_ok=True)

    assert_refused(evaluate(world, tmp_path, "--data", "nanoscifact"), 1, "NanoSciFact: expected .*--download")
    assert_refused(evaluate(world, tmp_path, "--data", "NanoSciFact", "--download"), 1, "offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    outcome = evaluate(world, tmp_path, "--data", "NanoSciFact", "--download", "--json")
    assert outcome.code == 0, outcome.err
    assert asked == ["zeta-alpha-ai/NanoSciFact"] and external_names("nanobeir") == list(NANO)
    (mean,) = (row["mean"] for row in json.loads(outcome.out)["sets"].values())
    result = json.loads((tmp_path / "report" / "mteb" / "NanoSciFact.json").read_text())
    (scores,) = result["scores"]["test"]
    assert scores["main_score"] == scores["ndcg_at_10"] == round(mean["ndcg@10"], 5)
    assert scores["recall_at_100"] == round(mean["recall@100"], 5) and result["task_name"] == "NanoSciFact"


def test_a_set_of_ir_datasets_becomes_a_beir_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ir_datasets = pytest.importorskip("ir_datasets")
    ours = BeirDataset.open(world.beir, "test")

    class Words:
        def has_docs(self) -> bool:
            return True

        has_queries = has_qrels = has_docs

        def docs_iter(self) -> Iterator[Document]:
            return (Document(passage.id, passage.title, passage.text) for passage in ours.passages())

        def queries_iter(self) -> Iterator[Query]:
            return (Query(query_id=query, text=text) for query, text in ours.queries.items())

        def qrels_iter(self) -> Iterator[SimpleNamespace]:
            for query, grades in ours.qrels.items():
                for passage, grade in grades.items():
                    yield SimpleNamespace(query_id=query, doc_id=passage, relevance=grade)

    assert_refused(evaluate(world, tmp_path, "--data", "ir:no/such", "--download"), 1, "ir:no/such: no such set")
    monkeypatch.setattr(ir_datasets, "load", lambda name: Words())
    outcome = evaluate(world, tmp_path, "--data", "ir:acme/words", "--download")
    assert outcome.code == 0, outcome.err
    copy = BeirDataset.open(tmp_path / "home" / "acme-words", "test")
    assert (copy.queries, copy.qrels) == (ours.queries, ours.qrels)
    assert [vars(passage) for passage in copy.passages()] == [vars(passage) for passage in ours.passages()]
