"""Towers of other kinds: decoders, truncated or unnormalized embeddings, unusual prompts, and refused models."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, StaticEmbedding

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.errors import ConfigError
from retriever.models.modality import build_towers, load_towers
from retriever.models.towers import SIDES, Side, Towers

TEXTS = ["a small domesticated feline", "walk", "move fast " * 40, "the act of walking", "Ångström, naïve"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1},
    "qwen2": {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ours(towers: Towers, side: Side = "document", texts: list[str] = TEXTS, budget: int = 10_000) -> np.ndarray:
    return embed_texts(towers.eval(), texts, side, EncodeOptions(micro_batch_tokens=budget))


def saved(towers: Towers, folder: Path) -> Path:
    folder.mkdir()
    towers.save(folder)
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def foreign(tiny: ModelConfig, folder: Path, **settings: Any) -> Path:
    """Save a model without normalization, with other settings of sentence-transformers."""
    saved(build_towers(dataclasses.replace(tiny, normalize=False)), folder)
    rewrite(folder / "config_sentence_transformers.json", **settings)
    return folder


def without_pad_token(tiny: ModelConfig, folder: Path, **settings: Any) -> str:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "pad_token"}
    path.write_text(json.dumps({**kept, **settings}))
    return str(folder)


@pytest.mark.parametrize("similarity", ["cosine", None])
def test_unnormalized_cosine_models_are_normalized(tiny: ModelConfig, tmp_path: Path, similarity: str | None) -> None:
    folder = foreign(tiny, tmp_path / "model", similarity_fn_name=similarity)
    theirs = SentenceTransformer(str(folder), device="cpu")
    raw = theirs.encode_document(TEXTS)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1
    vectors = ours(load_towers(str(folder)))
    np.testing.assert_allclose(vectors @ vectors.T, theirs.similarity(raw, raw), atol=1e-5)
    np.testing.assert_allclose(vectors, theirs.encode_document(TEXTS, normalize_embeddings=True), atol=1e-5)


def test_the_fingerprint_depends_on_the_similarity(tiny: ModelConfig, tmp_path: Path) -> None:
    folder = foreign(tiny, tmp_path / "model", similarity_fn_name="cosine")
    cosine = load_towers(str(folder)).fingerprint()
    rewrite(folder / "config_sentence_transformers.json", similarity_fn_name="dot")
    assert load_towers(str(folder)).fingerprint() != cosine
    normalized = build_towers(tiny)
    before = normalized.fingerprint()
    normalized.model.similarity_fn_name = "dot"
    assert normalized.fingerprint() != before


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan"])
def test_distance_similarities_are_refused(tiny: ModelConfig, tmp_path: Path, similarity: str) -> None:
    folder = foreign(tiny, tmp_path / "model", similarity_fn_name=similarity)
    with pytest.raises(InputError, match=f"cosine or dot, found {similarity}"):
        load_towers(str(folder))


@pytest.mark.parametrize("shared", [True, False])
def test_training_without_normalization_saves_a_dot_model(tiny: ModelConfig, tmp_path: Path, shared: bool) -> None:
    towers = build_towers(dataclasses.replace(tiny, normalize=False, shared=shared))
    folder = saved(towers, tmp_path / "model")
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.similarity_fn_name == "dot"
    loaded = load_towers(str(folder))
    np.testing.assert_allclose(ours(loaded), theirs.encode_document(TEXTS), atol=1e-5)
    assert np.abs(np.linalg.norm(ours(loaded), axis=1) - 1).max() > 0.1
    assert loaded.fingerprint() == towers.fingerprint()
    # Training from it adds a normalization, for two towers as well as one.
    again = build_towers(ModelConfig(name=str(folder)))
    np.testing.assert_allclose(np.linalg.norm(ours(again), axis=1), 1, atol=1e-5)
    assert SentenceTransformer(str(saved(again, tmp_path / "next")), device="cpu").similarity_fn_name == "cosine"


def test_projection_keeps_the_normalization_of_the_folder(tiny: ModelConfig, tmp_path: Path) -> None:
    folder = saved(build_towers(tiny), tmp_path / "model")
    towers = build_towers(ModelConfig(name=str(folder), projection=8, normalize=False))
    np.testing.assert_allclose(np.linalg.norm(ours(towers), axis=1), 1, atol=1e-5)
    assert [isinstance(module, Normalize) for module in towers.model] == [False, False, False, True]
    assert towers.model.similarity_fn_name == "cosine"


def test_truncate_dim_is_supported(tiny: ModelConfig, tmp_path: Path) -> None:
    folder = foreign(tiny, tmp_path / "dot", truncate_dim=8)
    theirs = SentenceTransformer(str(folder), device="cpu").encode_document(TEXTS)
    towers = load_towers(str(folder))
    assert towers.dimension == theirs.shape[1] == 8
    np.testing.assert_allclose(ours(towers), theirs, atol=1e-5)
    rewrite(folder / "config_sentence_transformers.json", similarity_fn_name="cosine")
    cosine = load_towers(str(folder))
    np.testing.assert_allclose(ours(cosine), theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-5)
    rewrite(folder / "config_sentence_transformers.json", truncate_dim=7)
    assert load_towers(str(folder)).fingerprint() != cosine.fingerprint()
    rewrite(folder / "config_sentence_transformers.json", truncate_dim=1000)
    assert load_towers(str(folder)).dimension == 32


@pytest.mark.parametrize("shared", [True, False])
def test_truncate_dim_is_kept_by_training(tiny: ModelConfig, tmp_path: Path, shared: bool) -> None:
    folder = foreign(tiny, tmp_path / "model", truncate_dim=8, similarity_fn_name="cosine")
    towers = build_towers(ModelConfig(name=str(folder), shared=shared))
    theirs = SentenceTransformer(str(saved(towers, tmp_path / "trained")), device="cpu")
    assert theirs.get_embedding_dimension() == towers.dimension == 8
    np.testing.assert_allclose(ours(towers), theirs.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours(towers), ours(load_towers(str(folder))), atol=1e-5)
    assert load_towers(str(tmp_path / "trained")).fingerprint() == towers.fingerprint()


@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "q: ", "document": "d: ", "passage": "p: "},
        {"query": "q: ", "passage": "p: "},
        {"document": "", "corpus": "c: "},
        {"corpus": "c: ", "own": "o: "},
        {},
    ],
)
@pytest.mark.parametrize("default", [None, "own"])
def test_prompts_equal_those_of_sentence_transformers(
    tiny: ModelConfig, tmp_path: Path, prompts: dict[str, str], default: str | None
) -> None:
    prompts = {"own": "mine: ", **prompts}
    folder = foreign(tiny, tmp_path / "model", prompts=prompts, default_prompt_name=default)
    theirs = SentenceTransformer(str(folder), device="cpu")
    towers = load_towers(str(folder))
    np.testing.assert_allclose(ours(towers, "query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours(towers), theirs.encode_document(TEXTS), atol=1e-5)
    # The same after training, including the default prompt of `encode`.
    trained = build_towers(ModelConfig(name=str(folder), normalize=False))
    after = SentenceTransformer(str(saved(trained, tmp_path / "trained")), device="cpu")
    np.testing.assert_allclose(after.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(after.encode_document(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(after.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("kind", list(DECODERS))
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_saved_decoders_embed_each_text_independently(
    tiny: ModelConfig, tmp_path: Path, kind: str, pooling: Any
) -> None:
    tokenizer = without_pad_token(tiny, tmp_path / "tokenizer", eos_token="[SEP]", padding_side="left")
    architecture = {"model_type": kind, **DECODERS[kind]}
    towers = build_towers(
        ModelConfig(architecture=architecture, tokenizer=tokenizer, pooling=pooling, max_length=48)
    ).eval()
    folder = saved(towers, tmp_path / "model")
    together, alone = ours(towers), ours(towers, budget=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.tokenizer.padding_side == "right" and theirs.tokenizer.pad_token is not None
    np.testing.assert_allclose(together, theirs.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(together, theirs.encode_document(TEXTS, batch_size=1), atol=1e-5)
    loaded = load_towers(str(folder))
    np.testing.assert_array_equal(ours(loaded), together)
    assert loaded.fingerprint() == towers.fingerprint()


def test_t5_embeds_with_its_encoder_as_sentence_transformers_does(tiny: ModelConfig, tmp_path: Path) -> None:
    architecture = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    towers = build_towers(dataclasses.replace(tiny, architecture=architecture))
    theirs = SentenceTransformer(str(saved(towers, tmp_path / "model")), device="cpu")
    np.testing.assert_allclose(ours(towers), theirs.encode_document(TEXTS), atol=1e-5)
    assert not [name for name, _ in towers.named_parameters() if "decoder" in name]
    assert load_towers(str(tmp_path / "model")).fingerprint() == towers.fingerprint()


def test_chat_templates_are_removed_in_training_and_refused_in_encoding(tiny: ModelConfig, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer = without_pad_token(tiny, tmp_path / "tokenizer", chat_template=template, pad_token="[PAD]")
    towers = build_towers(dataclasses.replace(tiny, tokenizer=tokenizer))
    folder = saved(towers, tmp_path / "model")
    theirs = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours(towers), theirs.encode_document(TEXTS), atol=1e-5)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    rewrite(folder / "sentence_bert_config.json", modality_config={"text": text, "message": {**text, "format": "flat"}})
    with pytest.raises(InputError, match="chat template"):
        load_towers(str(folder))
    again = build_towers(ModelConfig(name=str(folder)))
    np.testing.assert_allclose(ours(again), ours(towers), atol=1e-6)


def test_pad_token_is_chosen_from_the_vocabulary(tiny: ModelConfig, tmp_path: Path) -> None:
    for settings, expected in (({}, "[UNK]"), ({"eos_token": "[SEP]"}, "[SEP]")):
        tokenizer = without_pad_token(tiny, tmp_path / expected, **settings)
        towers = build_towers(dataclasses.replace(tiny, tokenizer=tokenizer))
        assert towers.tokenizer("query").tokenizer.pad_token == expected
    nothing = without_pad_token(tiny, tmp_path / "none", unk_token=None)
    with pytest.raises(InputError, match="no token to pad with"):
        build_towers(dataclasses.replace(tiny, tokenizer=nothing))


def test_fingerprint_depends_on_configuration_and_tokenizer(tiny: ModelConfig) -> None:
    towers = build_towers(tiny)
    seen = {json.dumps(towers.fingerprint())}
    transformer = towers._transformer("query")
    tokenizer = transformer.tokenizer
    for thing, name, value in (
        (transformer.auto_model.config, "num_attention_heads", 4),
        (transformer.auto_model.config, "hidden_act", "relu"),
        (tokenizer, "padding_side", "left"),
        (tokenizer, "truncation_side", "left"),
        (tokenizer, "pad_token", "[MASK]"),
    ):
        setattr(thing, name, value)
        seen.add(json.dumps(towers.fingerprint()))
    assert len(seen) == 6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_fingerprint_is_the_same_after_saving(tiny: ModelConfig, tmp_path: Path, model_type: str, shared: bool) -> None:
    assert tiny.architecture is not None
    architecture = {**tiny.architecture, "model_type": model_type, "max_position_embeddings": 80}
    towers = build_towers(dataclasses.replace(tiny, architecture=architecture, shared=shared, dropout=0.3))
    before = towers.fingerprint()
    ours(towers)
    assert towers.train().fingerprint() == before
    loaded = load_towers(str(saved(towers, tmp_path / "model")))
    assert loaded.fingerprint() == before
    ours(loaded)
    assert loaded.fingerprint() == before
    assert build_towers(ModelConfig(name=str(tmp_path / "model"), shared=shared)).fingerprint() == before
    np.testing.assert_array_equal(ours(loaded), ours(towers))


def test_max_length_is_within_the_positions_of_the_model(tiny: ModelConfig, tmp_path: Path) -> None:
    assert tiny.architecture is not None
    roberta = {**tiny.architecture, "model_type": "roberta", "pad_token_id": 0}
    for architecture, limit in ((tiny.architecture, 64), (roberta, 63)):
        config = dataclasses.replace(tiny, architecture=architecture)
        for longest in (limit + 1, 2, 1):
            with pytest.raises(ConfigError, match=r"model\.max_length: expected at (most|least) "):
                build_towers(dataclasses.replace(config, max_length=longest))
        # The limit is the number of positions, even if the tokenizer has none.
        for longest in (limit, None):
            towers = build_towers(dataclasses.replace(config, max_length=longest))
            assert towers.tokenizer("query").max_length == limit
            assert np.isfinite(ours(towers, texts=["a long text " * 40])).all()
    assert build_towers(dataclasses.replace(tiny, max_length=3)).tokenizer("query").max_length == 3


def test_tokenizer_without_a_limit_has_none(tiny: ModelConfig, tmp_path: Path) -> None:
    architecture = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    towers = build_towers(dataclasses.replace(tiny, architecture=architecture, max_length=None))
    assert towers.model.max_seq_length > 2**31 and towers.tokenizer("query").max_length is None
    assert len(towers.tokenizer("query")(["a " * 900]).ids) > 900


def test_models_without_a_first_transformer_are_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    towers = build_towers(tiny)
    transformer, pooling = towers.model[0], towers.model[1]
    models = {
        "static": [StaticEmbedding(transformer.tokenizer, embedding_dim=8)],
        "names": [Router({"left": [transformer, pooling], "right": [transformer, pooling]})],
        "late": [transformer, pooling, Router.for_query_document([Dense(32, 8)], [Dense(32, 8)])],
        "mixed": [
            Router.for_query_document(
                [StaticEmbedding(transformer.tokenizer, embedding_dim=32)], [transformer, Pooling(32)]
            )
        ],
    }
    for name, modules in models.items():
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name), create_model_card=False)
        for make in (load_towers, lambda folder: build_towers(ModelConfig(name=folder))):
            with pytest.raises(InputError, match=r"expected (one Router|a model that begins)") as caught:
                make(str(tmp_path / name))
            assert "\n" not in str(caught.value)


def test_vision_models_are_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="text") as caught:
        load_towers(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"num_attention_heads": 0}, "cannot be built"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"model_type": "brt"}, "'brt'; near it: .*bert"),
        ({"model_type": None}, "no model_type"),
        ({"vocab_size": 5}, "vocab_size: expected at least"),
    ],
)
def test_invalid_architectures_are_config_errors(tiny: ModelConfig, fields: dict[str, Any], message: str) -> None:
    assert tiny.architecture is not None
    with pytest.raises(ConfigError, match=message) as caught:
        build_towers(dataclasses.replace(tiny, architecture={**tiny.architecture, **fields}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_contradictory_configurations_are_config_errors(tiny: ModelConfig, tmp_path: Path) -> None:
    folder = str(saved(build_towers(dataclasses.replace(tiny, shared=False)), tmp_path / "two"))
    for config in (
        ModelConfig(),
        dataclasses.replace(tiny, name=folder),
        dataclasses.replace(tiny, tokenizer=None),
        ModelConfig(name=folder, pooling="cls"),
        ModelConfig(name=folder, projection=4),
    ):
        with pytest.raises(ConfigError):
            build_towers(config)


@pytest.mark.parametrize("shared", [True, False])
def test_gradient_checkpointing_changes_no_gradient_and_does_not_warn(tiny: ModelConfig, shared: bool) -> None:
    towers = build_towers(dataclasses.replace(tiny, shared=shared, dropout=0.0))

    def gradients() -> list[torch.Tensor]:
        towers.zero_grad()
        for side in SIDES:
            tokenizer = towers.tokenizer(side)
            towers(tokenizer.pad(tokenizer(TEXTS), np.arange(len(TEXTS))), side)[:, 0].sum().backward()
        return [parameter.grad.clone() for parameter in towers.parameters() if parameter.grad is not None]

    plain = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        towers.enable_gradient_checkpointing()
    for side in SIDES:
        assert any(getattr(part, "gradient_checkpointing", False) for part in towers._transformer(side).modules())
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)
