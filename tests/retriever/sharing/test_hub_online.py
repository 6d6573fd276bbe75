"""What needs the internet: a model and sets by name, and the hub's own check of a card. Run with `-m network`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import World

import retriever
from eval.sets.external import external_folder
from index.beir import BeirDataset

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.network, pytest.mark.timeout(1200)]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
LOAD = """
import sys
import numpy as np
import retriever
np.save(sys.argv[2], retriever.load(sys.argv[1], precision="fp32").encode_queries(["a cat", "define oak"]))
"""
CHECK_CARD = """
import sys
from huggingface_hub import ModelCard
ModelCard.load(sys.argv[1], ignore_metadata_errors=False).validate()
"""


@pytest.fixture(autouse=True)
def internet() -> None:
    """Skip without a connection."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=10).close()
    except OSError as error:
        pytest.skip(f"no connection to the hub: {error}")


def python(*words: object, home: Path, **environment: str) -> str:
    """What Python prints, in a process that may use the hub, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables = {**kept, "HF_HOME": str(home), "IR_DATASETS_HOME": str(home / "ir"), **environment}
    done = subprocess.run([sys.executable, *map(str, words)], env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_of_the_hub_is_the_one_of_the_package(minilm: str, tmp_path: Path) -> None:
    name, out = f"{MINILM}@{COMMIT}", tmp_path / "embeddings.npy"
    expected = retriever.load(minilm, precision="fp32").encode_queries(["a cat", "define oak"])
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        python("-c", LOAD, name, out, home=tmp_path / "hub", **settings)
        np.testing.assert_allclose(np.load(out), expected, atol=1e-5)


def test_the_hub_accepts_the_metadata_of_a_card(world: World, tmp_path: Path) -> None:
    python("-c", CHECK_CARD, world.model / "README.md", home=tmp_path)


@pytest.mark.parametrize(("name", "queries"), [("NanoSciFact", 50), ("ir:vaswani", 93)])
def test_a_set_is_downloaded_by_name(name: str, queries: int, world: World, tmp_path: Path) -> None:
    words: list[Any] = ["--model", world.model, "--home", tmp_path / "sets", "--out", tmp_path / "report", "--json"]
    command = ["-m", "retriever", "evaluate", "beir", "--data", name, "--download", *words]
    (result,) = json.loads(python(*command, home=tmp_path / "hub"))["sets"].values()
    assert 0 < result["mean"]["recall@100"] <= 1
    assert len(BeirDataset.open(external_folder(name, tmp_path / "sets"), "test").queries) == queries
