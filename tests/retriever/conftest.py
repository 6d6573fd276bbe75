"""Triton's interpreter, and a fixture with a tiny run, its embeddings and its index."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels run under Triton's interpreter, which must be enabled before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton.language  # noqa: F401

from cli_helpers import World, command, write_beir, write_config, write_pairs

from retriever.config.model import ModelConfig
from retriever.training.tracking import plot


@pytest.fixture(scope="session", autouse=True)
def draw_no_plots() -> Iterator[None]:
    """Draw no plot of a training run, which takes half a second, except in the test of the plot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "MIN_ROWS", sys.maxsize)
        yield


@pytest.fixture(scope="session")
def world(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Run train, encode and index build."""
    folder = tmp_path_factory.mktemp("world")
    pairs, beir = write_pairs(folder / "pairs.jsonl"), write_beir(folder / "words")
    config = write_config(folder / "run.yaml", tiny, pairs)
    run, embeddings, index = folder / "run", folder / "embeddings", folder / "index"
    for arguments in (
        ("train", config),
        ("encode", "--model", run / "model", "--data", beir, "--out", embeddings),
        ("index", "build", "--embeddings", embeddings, "--out", index),
    ):
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.err
    return World(pairs, beir, config, run, run / "model", embeddings, index)
