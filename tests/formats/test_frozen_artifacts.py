"""What an earlier version wrote is read: a store, an index, a run with its checkpoint and model, of November 2026.

version_1.tar.gz and version_1_further.tar.gz were written by the commands on the artifacts of tests/robustness, and are
never written again. The second has stores of codes, an index with fields, an adapter, a cross-encoder and scores.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "retriever"))

from cli_helpers import command  # noqa: E402

from index.store.reader import EmbeddingStore  # noqa: E402


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    with tarfile.open(HERE / "version_1.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("@FOLDER@", str(folder)))
    return folder


def test_an_earlier_store_index_and_model_are_read(frozen: Path) -> None:
    for name in ("store", "index"):
        outcome = command("index", "verify", frozen / name)
        assert outcome.code == 0, outcome.err
    words = ("--model", frozen / "run" / "model", "--index", frozen / "index", "--k", 3, "--json", "what is a river?")
    outcome = command("search", *words)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [result["id"] for result in found["results"]] == ["d1", "d6", "d4"]
    again = frozen / "again"
    outcome = command("encode", "--model", frozen / "run" / "model", "--data", frozen / "beir", "--out", again)
    assert outcome.code == 0, outcome.err
    old, new = (EmbeddingStore.open(folder) for folder in (frozen / "store", again))
    np.testing.assert_allclose(old.vectors(), new.vectors(), atol=1e-5)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("further")
    with tarfile.open(HERE / "version_1_further.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    config = folder / "adapter" / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace("@FOLDER@", str(folder)))
    return folder


@pytest.mark.parametrize("name", ["store_int8", "store_binary"])
def test_earlier_stores_of_codes_are_read(further: Path, name: str) -> None:
    assert command("index", "verify", further / name).code == 0
    store = EmbeddingStore.open(further / name)
    assert (store.rows, store.dim, store.dtype) == (20, 32, name.partition("_")[2])
    np.testing.assert_allclose(np.linalg.norm(store.vectors(), axis=1), 1, atol=1e-5)
    again = further / f"again_{name}"
    words = ("--data", further / "beir", "--out", again, "--shard-rows", 8, "--dtype", store.dtype)
    assert command("encode", "--model", further / "run" / "model", *words).code == 0
    # Rounding may move a value to the next code.
    assert np.abs(EmbeddingStore.open(again).vectors() - store.vectors()).mean() < 1e-3


def test_an_earlier_index_with_fields_is_filtered(further: Path) -> None:
    assert command("index", "verify", further / "fields_index").code == 0
    words = ("--model", further / "run" / "model", "--index", further / "fields_index", "--k", 20, "--json")
    outcome = command("search", *words, "--filter", "year>=2000 meta.kind=noun", "what is a river?")
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)["results"]
    assert sorted(result["fields"]["year"] for result in results) == [2000, 2002, 2004, 2006, 2008]
    assert all("noun" in result["fields"]["meta.kind"] for result in results)


def test_an_earlier_adapter_and_cross_encoder_are_loaded(further: Path) -> None:
    words = ("--data", further / "beir", "--out", further / "adapted")
    outcome = command("encode", "--model", further / "adapter" / "model", *words)
    assert outcome.code == 0, outcome.err
    base = EmbeddingStore.open(further / "store_int8").vectors()
    assert 1e-3 < np.abs(EmbeddingStore.open(further / "adapted").vectors() - base).max() < 1
    words = ("--data", further / "mined.jsonl", "--out", further / "again.jsonl")
    for model in (further / "run" / "model", further / "cross_encoder"):
        outcome = command("score", "--model", model, *words)
        assert outcome.code == 0, outcome.err
        if model.name == "model":
            found, known = (
                [json.loads(line)["scores"] for line in file.read_text().splitlines()]
                for file in (further / "again.jsonl", further / "scored.jsonl")
            )
            np.testing.assert_allclose(np.concatenate(found), np.concatenate(known), atol=1e-4)
            (further / "again.jsonl").unlink()


def test_an_earlier_run_is_resumed(frozen: Path) -> None:
    outcome = command("train", "--resume", frozen / "run")
    assert outcome.code == 0, outcome.err
    assert "step-00000006 (step 6 of 6)" in " ".join((outcome.out + outcome.err).split())
