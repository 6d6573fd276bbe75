"""Settings of the Transformer module take effect as in sentence-transformers, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_helpers import assert_embeds_alike, encoder_folder, model_folder, ours, rewrite, theirs, transformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.normalizers import BertNormalizer

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.data.batches import TrainingBatch
from retriever.data.micro_batches import BatchPreparer
from retriever.errors import ConfigError
from retriever.evaluation.set_settings import AdjustedTowers, SetSettings
from retriever.models.loading.text_settings import SIDES
from retriever.models.modality import build_towers, load_towers

SUPPORTED: dict[str, dict[str, Any]] = {
    "lengths by side": {"query_length": 8, "document_length": 30},
    "length of the call": {"query_length": 8, "processing_kwargs": {"text": {"max_length": 12}}},
    "no length of the call": {"query_length": 8, "processing_kwargs": {"text": {"max_length": None}}},
    "common length": {"processing_kwargs": {"text": {"max_length": 40}, "common": {"max_length": 9}}},
    "no special tokens": {"processing_kwargs": {"text": {"add_special_tokens": False}}},
    "padding to a length": {"processing_kwargs": {"text": {"padding": "max_length", "pad_to_multiple_of": 8}}},
    "padding that is read": {
        "processing_kwargs": {"text": {"padding": "max_length", "max_length": 40, "return_attention_mask": False}}
    },
    "of other inputs": {"processing_kwargs": {"chat_template": {"x": 1}, "image": {"size": 3}}},
    "fixed expansion": {"query_expansion": {"length": 20, "strategy": "fixed", "attend": True}},
    "least expansion": {"query_expansion": {"length": 20, "strategy": "min", "attend": True, "token": "[SEP]"}},
    "least expansion, longer queries": {
        "query_length": 30,
        "query_expansion": {"length": 20, "strategy": "min", "attend": True},
    },
    "expansion that is masked": {"query_expansion": {"length": 20, "strategy": "fixed"}},
    "no flattening": {"unpad_inputs": False},
}
REFUSED: dict[str, dict[str, Any]] = {
    "return_attention_mask: expected true": {"processing_kwargs": {"text": {"return_attention_mask": False}}},
    "truncation: expected true, found False": {"processing_kwargs": {"text": {"truncation": False}}},
    "split_special_tokens: not supported": {"processing_kwargs": {"common": {"split_special_tokens": True}}},
    "return_tensors: expected pt": {"processing_kwargs": {"common": {"return_tensors": "np"}}},
    "max_length: expected a number above 0, found 0": {"processing_kwargs": {"text": {"max_length": 0}}},
    "expected text, common, .*found txt": {"processing_kwargs": {"txt": {"max_length": 9}}},
    "query_length: expected a number above 0, found 0": {"query_length": 0},
    "a query's length: expected more than 2, the number of special tokens, found 1": {"query_length": 1},
    "a document's length: expected more than 2": {"document_length": 2},
    "a query's length: expected more than 2, .* found 2": {"processing_kwargs": {"text": {"max_length": 2}}},
    "a document's length: expected more than 2, .* found 1": {"document_length": 1},
    "max_seq_length: expected a number above 0, found 0": {"max_seq_length": 0},
    "max_seq_length: expected a number above 0, found '30'": {"max_seq_length": "30"},
    "transformer_task: expected feature-extraction, found fill-mask": {"transformer_task": "fill-mask"},
    "depends on the other texts of its batch: its tokenizer pads on the left": {
        "processing_kwargs": {"text": {"padding_side": "left"}}
    },
    "no max_length among the common": {
        "query_expansion": {"length": 20, "strategy": "fixed"},
        "processing_kwargs": {"common": {"max_length": 9}},
    },
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_settings_take_effect_and_are_saved(name: str, encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder, **SUPPORTED[name]), Pooling(32))
    assert_embeds_alike(folder, padding_free=name != "padding that is read")
    (tmp_path / "trained").mkdir()
    build_towers(ModelConfig(name=folder)).save(tmp_path / "trained")
    for side in SIDES:
        np.testing.assert_allclose(theirs(str(tmp_path / "trained"), side), theirs(folder, side), atol=2e-6)
    before, after = (
        json.loads((Path(each) / "sentence_bert_config.json").read_text()) for each in (folder, tmp_path / "trained")
    )
    assert after == before


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_settings_are_refused_by_name(message: str, encoder: str, tmp_path: Path) -> None:
    settings = REFUSED[message]
    later = {key: settings[key] for key in settings if key in ("transformer_task", "max_seq_length")}
    kept = {key: value for key, value in settings.items() if key not in later}
    folder = model_folder(tmp_path / "model", transformer(encoder, **kept), Pooling(32))
    rewrite(Path(folder) / "sentence_bert_config.json", **later)
    for load in (load_towers, lambda path: build_towers(ModelConfig(name=path))):
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert str(caught.value).startswith(folder) and "\n" not in str(caught.value)


def test_each_route_has_its_own_settings(tiny: ModelConfig, encoder: str, tmp_path: Path) -> None:
    bare = {"processing_kwargs": {"text": {"add_special_tokens": False}}}
    query = [transformer(encoder, query_length=8, document_length=3), Pooling(32, "cls")]
    document = [transformer(encoder_folder(tiny, tmp_path / "other"), document_length=20, **bare), Pooling(32)]
    folder = model_folder(tmp_path / "model", Router.for_query_document(query, document))
    assert_embeds_alike(folder, padding_free=True)


def test_lower_case_is_saved_with_the_model(tiny: ModelConfig, tmp_path: Path) -> None:
    def cased(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)

    folder = model_folder(
        tmp_path / "model", transformer(encoder_folder(tiny, tmp_path / "cased", edit=cased)), Pooling(32)
    )
    plain = theirs(folder, "query")
    rewrite(Path(folder) / "sentence_bert_config.json", do_lower_case=True)
    lowered = theirs(folder, "query")
    assert np.abs(plain - lowered).max() > 0.01
    assert_embeds_alike(folder)
    (tmp_path / "trained").mkdir()
    build_towers(ModelConfig(name=folder)).save(tmp_path / "trained")
    np.testing.assert_allclose(theirs(str(tmp_path / "trained"), "query"), lowered, atol=2e-6)


def test_queries_and_passages_of_a_batch_are_truncated_by_side(encoder: str, tmp_path: Path) -> None:
    settings = {"query_length": 8, "document_length": 20}
    folder = model_folder(tmp_path / "model", transformer(encoder, **settings), Pooling(32))
    long = "a b " * 40
    batch = TrainingBatch(0, [long, "a"], [long, long], ["b"], np.arange(2), np.arange(3))
    prepared = BatchPreparer.of(build_towers(ModelConfig(name=folder)), 64)(batch)
    assert len(prepared.groups) == 1
    assert prepared.groups[0].lengths.tolist() == [8, 3, 20, 20, 3]


def test_a_configured_max_length_overrides_the_folders(encoder: str, tmp_path: Path) -> None:
    kwargs = {"text": {"max_length": 12}}
    folder = model_folder(tmp_path / "m", transformer(encoder, query_length=8, processing_kwargs=kwargs), Pooling(32))
    towers = build_towers(ModelConfig(name=folder, max_length=24))
    assert [towers.tokenizer(side).max_length for side in SIDES] == [24, 24]
    (tmp_path / "trained").mkdir()
    towers.save(tmp_path / "trained")
    for side in SIDES:
        np.testing.assert_allclose(theirs(str(tmp_path / "trained"), side), ours(towers, side), atol=2e-6)


def test_lengths_are_limited_to_the_positions(encoder: str, tmp_path: Path) -> None:
    kwargs = {"text": {"max_length": 1000}}
    for name, settings in (
        ("a", {"query_length": 1000, "document_length": 1000}),
        ("b", {"processing_kwargs": kwargs}),
    ):
        folder = model_folder(tmp_path / name, transformer(encoder, **settings), Pooling(32))
        towers = load_towers(folder)
        assert [towers.tokenizer(side).max_length for side in SIDES] == [64, 64]
        assert np.isfinite(ours(towers, "query")).all()


def test_lengths_below_the_query_expansion_are_refused(encoder: str, tmp_path: Path) -> None:
    expansion = {"length": 20, "strategy": "fixed", "attend": True}
    folder = model_folder(tmp_path / "model", transformer(encoder, query_expansion=expansion), Pooling(32))
    with pytest.raises(ConfigError, match=r"model\.max_length: query_expansion: length: expected at most"):
        build_towers(ModelConfig(name=folder, max_length=10))
    with pytest.raises(InputError, match="query length: expected at least 20"):
        AdjustedTowers(load_towers(folder), SetSettings(query_max_length=10))
