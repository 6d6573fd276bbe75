"""Write tiny sentence-transformers model folders, with weights large enough for embeddings to differ."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.loading.text_settings import SIDES, Side
from retriever.models.modality import build_towers, load_towers
from retriever.models.towers import Towers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
TEXTS = ["a cat", "move fast " * 40, "The act of walking", "a [SEP] and a [PAD] in a text", "x"]


def encoder_folder(
    tiny: ModelConfig, folder: Path, kind: str = "bert", edit: Callable[[Any], None] | None = None, **settings: Any
) -> str:
    """Save an encoder with random weights and the tiny tokenizer, changed by `edit`. Settings of None are left out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    if edit is not None:
        edit(tokenizer)
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, **SMALL, **settings}
    fields = {name: value for name, value in fields.items() if value is not None}
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def model_folder(folder: Path, *modules: torch.nn.Module, **settings: Any) -> str:
    """Save a sentence-transformers model of these modules."""
    model = SentenceTransformer(modules=list(modules), device="cpu", **settings)
    model.save(str(folder), create_model_card=False)
    return str(folder)


def transformer(encoder: str, **settings: Any) -> Transformer:
    """Return the module of an encoder with a maximum length of 48 tokens."""
    return Transformer(encoder, **{"max_seq_length": 48, **settings})


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def theirs(folder: str, side: Side, texts: list[str] = TEXTS) -> np.ndarray:
    """Return the embeddings of sentence-transformers, of unit length."""
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    encode = model.encode_query if side == "query" else model.encode_document
    return np.asarray(encode(texts, normalize_embeddings=True))


def ours(towers: Towers, side: Side, texts: list[str] = TEXTS) -> np.ndarray:
    """Return the embeddings of the towers, of unit length."""
    found = embed_texts(towers.eval(), texts, side, EncodeOptions())
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def assert_embeds_alike(folder: str, *, padding_free: bool | None = None) -> None:
    """Check that embeddings equal those of sentence-transformers on both sides, also without padding if supported."""
    towers, bare = load_towers(folder), load_towers(folder)
    dropped = bare.enable_packing()
    assert padding_free is None or dropped == padding_free
    # Without Triton's interpreter, which is slow.
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        for side in SIDES:
            expected = theirs(folder, side)
            np.testing.assert_allclose(ours(towers, side), expected, atol=2e-6)
            if dropped:
                np.testing.assert_allclose(ours(bare, side), expected, atol=2e-6)


def build(folder: str) -> Towers:
    return build_towers(ModelConfig(name=folder))


def refuse(folder: str, message: str, *loads: Any) -> None:
    for load in loads or (load_towers, build):
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
