"""Towers give the embeddings of sentence-transformers, before and after saving."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.modality import build_towers, load_towers
from retriever.models.towers import Towers

TEXTS = ["a small domesticated feline", "", "move fast " * 40, "the act of walking", "Ångström, naïve — 中文"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ours(towers: Towers, side: str = "document", budget: int = 64) -> np.ndarray:
    return embed_texts(towers.eval(), TEXTS, side, EncodeOptions(micro_batch_tokens=budget))


def saved(towers: Towers, folder: Path) -> Path:
    folder.mkdir()
    towers.save(folder)
    return folder


def test_embeddings_of_a_pretrained_folder_equal_sentence_transformers(minilm: str) -> None:
    theirs = SentenceTransformer(minilm, device="cpu").encode_document(TEXTS)
    np.testing.assert_allclose(ours(load_towers(minilm)), theirs, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("projection", [None, 8])
def test_a_saved_folder_gives_the_same_embeddings_in_sentence_transformers(
    tiny: ModelConfig, tmp_path: Path, pooling: str, projection: int | None
) -> None:
    config = dataclasses.replace(
        tiny, pooling=pooling, projection=projection, query_prompt="query: ", passage_prompt="passage: ", max_length=24
    )
    towers = build_towers(config)
    folder = saved(towers, tmp_path / "model")
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 24
    np.testing.assert_allclose(ours(towers, "query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours(towers, "document"), theirs.encode_document(TEXTS), atol=1e-5)
    assert ours(towers).shape == (len(TEXTS), projection or 32)
    assert np.abs(ours(towers, "query") - ours(towers, "document")).max() > 1e-4


def test_two_towers_are_saved_separately(tiny: ModelConfig, tmp_path: Path) -> None:
    towers = build_towers(dataclasses.replace(tiny, shared=False))
    np.testing.assert_array_equal(ours(towers, "query"), ours(towers, "document"))
    with torch.no_grad():
        for parameter in towers.model[0].sub_modules["query"].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = saved(towers, tmp_path / "model")
    theirs = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours(towers, "query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours(towers, "document"), theirs.encode_document(TEXTS), atol=1e-5)
    assert np.abs(ours(towers, "query") - ours(towers, "document")).max() > 1e-4
    np.testing.assert_array_equal(ours(load_towers(str(folder)), "query"), ours(towers, "query"))


def test_plain_hugging_face_folder_becomes_a_tower(minilm: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(minilm) / name, tmp_path / name)
    towers = build_towers(ModelConfig(name=str(tmp_path), max_length=256))
    np.testing.assert_allclose(ours(towers), ours(load_towers(minilm)), atol=1e-6)


def test_padding_is_masked_and_on_the_right(tiny: ModelConfig) -> None:
    tokenizer = build_towers(tiny).tokenizer("query")
    tokens = tokenizer(TEXTS)
    padded = tokenizer.pad(tokens, np.array([0, 3, 1]))
    assert padded["attention_mask"].sum(1).tolist() == tokens.lengths[[0, 3, 1]].tolist()
    assert padded["attention_mask"][:, 0].all() and (padded["attention_mask"].diff() <= 0).all()
    pad = tokenizer.tokenizer.pad_token_id
    assert (padded["input_ids"][padded["attention_mask"] == 0] == pad).all()
    first = tokens.ids[tokens.offsets[0] : tokens.offsets[1]]
    assert padded["input_ids"][0][padded["attention_mask"][0] == 1].tolist() == first.tolist()


def test_fingerprint_changes_with_weights_and_prompts_only(tiny: ModelConfig, tmp_path: Path) -> None:
    towers = build_towers(tiny)
    folder = saved(towers, tmp_path / "model")
    first = towers.fingerprint()
    assert load_towers(str(folder)).fingerprint() == load_towers(str(folder)).fingerprint() == first
    towers.model.prompts["query"] = "query: "
    second = towers.fingerprint()
    with torch.no_grad():
        next(towers.parameters())[0, 0] += 1e-3
    assert len({json.dumps(f) for f in (first, second, towers.fingerprint())}) == 3


def test_invalid_models_are_one_line_errors(minilm: str, tiny: ModelConfig, tmp_path: Path) -> None:
    shutil.copy(Path(minilm) / "config.json", tmp_path / "config.json")
    cases = {
        "no tokenizer": ModelConfig(name=str(tmp_path)),
        "no such model folder": ModelConfig(name="./nowhere"),
        "expected either": ModelConfig(),
        "hiden_size: unknown to bert; did you mean hidden_size": dataclasses.replace(
            tiny, architecture={"model_type": "bert", "hiden_size": 32}
        ),
        "model.architecture: cannot be built": dataclasses.replace(tiny, architecture={"model_type": "nonsense"}),
        "model.tokenizer": dataclasses.replace(tiny, tokenizer=None),
        r"prompt 'cat cat .*expected fewer than 5 tokens, found \d+$": dataclasses.replace(
            tiny, max_length=5, passage_prompt="cat " * 20
        ),
    }
    for message, config in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            build_towers(config)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found neither"):
        load_towers(str(tmp_path / "empty"))
