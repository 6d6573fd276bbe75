"""What an earlier version wrote is read: a store, an index, a run with its checkpoint and model, of November 2026.

version_1.tar.gz was written by the commands on the artefacts of tests/robustness; it is never written again.
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


def test_an_earlier_run_is_resumed(frozen: Path) -> None:
    outcome = command("train", "--resume", frozen / "run")
    assert outcome.code == 0, outcome.err
    assert "step-00000006 (step 6 of 6)" in " ".join((outcome.out + outcome.err).split())
