"""Models whose embeddings would differ from sentence-transformers are refused on loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_helpers import (
    SMALL,
    TEXTS,
    assert_embeds_alike,
    build,
    encoder_folder,
    model_folder,
    ours,
    refuse,
    rewrite,
    theirs,
    transformer,
)
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    WeightedLayerPooling,
    WordWeights,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.modality import build_towers, load_towers


@pytest.mark.parametrize("mode", [*Pooling.POOLING_MODES, ("cls", "mean")])
def test_every_pooling_mode_is_supported(encoder: str, tmp_path: Path, mode: Any) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32, mode))
    assert_embeds_alike(folder, padding_free=mode in ("mean", "cls", "lasttoken"))


def test_tokenwise_modules_are_supported(encoder: str, tmp_path: Path) -> None:
    layers = {"config_kwargs": {"output_hidden_states": True}}
    words = list(AutoTokenizer.from_pretrained(encoder).get_vocab())
    tokens = Dense(32, 16, module_input_name="token_embeddings")
    models: dict[str, tuple[bool, list[Any]]] = {
        "after": (True, [transformer(encoder), Pooling(32), Dense(32, 16), LayerNorm(16), Dropout(0.3), Normalize()]),
        "before": (True, [transformer(encoder), tokens, Normalize("token_embeddings"), Pooling(16)]),
        "layers": (False, [transformer(encoder, **layers), WeightedLayerPooling(32, 2, 1), Pooling(32)]),
        "words": (False, [transformer(encoder), WordWeights(words, {"a": 3.0, "t": 0.1}), Pooling(32)]),
    }
    for name, (padding_free, modules) in models.items():
        assert_embeds_alike(model_folder(tmp_path / name, *modules), padding_free=padding_free)


def test_a_module_that_mixes_tokens_is_refused(encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), CNN(32, 8, [1, 3]), Pooling(16))
    refuse(folder, "a text's embedding depends on the other texts of its batch: its encoder or a module mixes padding")
    assert_embeds_alike(
        model_folder(tmp_path / "one", transformer(encoder), CNN(32, 8, [1]), Pooling(8)), padding_free=False
    )


def test_embeddings_do_not_depend_on_the_padding_side(tiny: ModelConfig, encoder: str, tmp_path: Path) -> None:
    relative = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160}
    decoder = encoder_folder(tiny, tmp_path / "qwen3", "qwen3", **relative)
    rewrite(Path(decoder) / "tokenizer_config.json", padding_side="left")
    assert AutoTokenizer.from_pretrained(decoder).padding_side == "left"
    for mode in ("lasttoken", "weightedmean"):
        assert_embeds_alike(model_folder(tmp_path / mode, transformer(decoder), Pooling(32, mode)))
    absolute = encoder_folder(tiny, tmp_path / "bert")
    rewrite(Path(absolute) / "tokenizer_config.json", padding_side="left")
    folder = model_folder(tmp_path / "absolute", transformer(absolute), Pooling(32))
    refuse(folder, "depends on the other texts of its batch: its tokenizer pads on the left", load_towers)
    # Training saves it with padding on the right.
    (tmp_path / "trained").mkdir()
    build(folder).save(tmp_path / "trained")
    assert_embeds_alike(str(tmp_path / "trained"))


def test_token_types_that_change_embeddings_are_used(tiny: ModelConfig, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    def typed(single: str) -> Any:
        def edit(tokenizer: Any) -> None:
            special = [("[CLS]", 2), ("[SEP]", 3)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)

        return edit

    names = ["input_ids", "token_type_ids", "attention_mask"]
    xlnet = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    cases: list[tuple[str, str, dict[str, Any], list[int]]] = [
        ("bert", "[CLS]:0 $A:0 [SEP]:1", {}, [0, 0, 1]),
        ("bert", "[CLS]:1 $A:1 [SEP]:0 [SEP]:1", {}, [1, 1, 0, 1]),
        ("xlnet", "$A:0 [SEP]:0 [CLS]:2", xlnet, [0, 0, 2]),
        # GPT-2 also adds the embedding of token type 0.
        ("gpt2", "[CLS]:0 $A:0", gpt2, [0, 0]),
    ]
    for number, (kind, single, sizes, types) in enumerate(cases):
        encoder = encoder_folder(tiny, tmp_path / f"encoder{number}", kind, typed(single), vocab_size=160, **sizes)
        rewrite(Path(encoder) / "tokenizer_config.json", model_input_names=names, tokenizer_class="TokenizersBackend")
        assert AutoTokenizer.from_pretrained(encoder)("x")["token_type_ids"] == types
        folder = model_folder(tmp_path / f"model{number}", transformer(encoder), Pooling(32))
        assert_embeds_alike(folder, padding_free=False)
        towers = build_towers(ModelConfig(name=folder, shared=False))
        (tmp_path / f"trained{number}").mkdir()
        towers.save(tmp_path / f"trained{number}")
        assert_embeds_alike(str(tmp_path / f"trained{number}"))


def test_token_types_without_effect_are_omitted(tiny: ModelConfig, tmp_path: Path) -> None:
    encoder = encoder_folder(tiny, tmp_path / "encoder")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    rewrite(Path(encoder) / "tokenizer_config.json", model_input_names=names)
    towers = load_towers(model_folder(tmp_path / "model", transformer(encoder), Pooling(32)))
    tokenizer = towers.tokenizer("query")
    assert {*tokenizer.pad(tokenizer(TEXTS), np.arange(2))} == {"input_ids", "attention_mask"}
    assert towers.enable_packing()


def test_modules_that_do_not_fit_are_refused(encoder: str, tmp_path: Path) -> None:
    shared = transformer(encoder)
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    nothing = transformer(encoder, modality_config=text, module_output_name="nothing")
    models: dict[str, tuple[str, list[Any]]] = {
        "widths": ("expected embeddings of 64 dimensions, as its modules say, found 32", [shared, Pooling(64)]),
        "input": ("cannot embed texts: .*shapes cannot be multiplied", [shared, Pooling(32), Dense(64, 8)]),
        "output": ("cannot embed texts: KeyError: 'token_embeddings'", [nothing, Pooling(32)]),
        "sides": (
            "expected embeddings of 32 dimensions, as its modules say, found 16",
            [Router.for_query_document([shared, Pooling(32)], [transformer(encoder), Pooling(32), Dense(32, 16)])],
        ),
    }
    for name, (message, modules) in models.items():
        refuse(model_folder(tmp_path / name, *modules), message)


def test_embeddings_that_are_not_finite_are_refused(encoder: str, tmp_path: Path) -> None:
    dense = Dense(32, 8)
    with torch.no_grad():
        dense.linear.weight[0, 0] = float("nan")
    refuse(model_folder(tmp_path / "model", transformer(encoder), Pooling(32), dense), "embeddings are not finite")


def test_every_route_is_checked(encoder: str, tmp_path: Path) -> None:
    shared = transformer(encoder)
    right = Router.for_query_document([shared, Pooling(32)], [shared, Pooling(32, "cls")])
    assert_embeds_alike(model_folder(tmp_path / "right", right), padding_free=False)
    mixing = [shared, CNN(32, 32, [3]), Pooling(32)]
    refuse(model_folder(tmp_path / "wrong", Router.for_query_document([shared, Pooling(32)], mixing)), "mixes padding")


def test_configured_pooling_must_fit_the_following_modules(encoder: str, tmp_path: Path) -> None:
    two = model_folder(tmp_path / "two", transformer(encoder), Pooling(32, ("cls", "mean")), Dense(64, 16))
    with pytest.raises(ConfigError, match=r"model\.pooling: mean gives 32 dimensions, but the Dense .* expects 64"):
        build_towers(ModelConfig(name=two, pooling="mean"))
    text = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    pooler = transformer(encoder, modality_config=text, module_output_name="sentence_embedding")
    none = model_folder(tmp_path / "none", pooler)
    assert_embeds_alike(none)
    with pytest.raises(ConfigError, match=r"model\.pooling: expected none for .*, which has 0 poolings"):
        build_towers(ModelConfig(name=none, pooling="mean"))
    # The dimension is that of the input of the old pooling.
    narrow = Dense(32, 16, module_input_name="token_embeddings")
    folder = model_folder(tmp_path / "narrow", transformer(encoder), narrow, Pooling(16, include_prompt=False))
    towers = build_towers(ModelConfig(name=folder, pooling="cls"))
    (tmp_path / "trained").mkdir()
    towers.save(tmp_path / "trained")
    assert towers.dimension == 16
    assert towers.model[2].get_config_dict() == {
        "embedding_dimension": 16,
        "pooling_mode": "cls",
        "include_prompt": False,
    }
    assert_embeds_alike(str(tmp_path / "trained"))


def test_token_ids_beyond_the_vocabulary_are_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    def padded(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"pad_token": "[MORE]"})

    size = len(AutoTokenizer.from_pretrained(tiny.tokenizer))
    encoder = encoder_folder(tiny, tmp_path / "encoder", edit=padded, vocab_size=size)
    refuse(encoder, rf"expected token ids below {size}, .* found {size} for \[MORE\]")


def test_tokenizers_without_a_vocabulary_are_loaded(tiny: ModelConfig, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 400}
    encoder_folder(tiny, tmp_path / "encoder", "t5", **sizes)
    for file in (tmp_path / "encoder").glob("*token*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
    folder = model_folder(tmp_path / "model", transformer(str(tmp_path / "encoder")), Pooling(32))
    assert not list(Path(folder).rglob("tokenizer.json"))
    assert_embeds_alike(folder)
    (Path(folder) / "tokenizer_config.json").unlink()
    refuse(folder, "has no tokenizer")


@pytest.mark.parametrize("causal", [True, False])
def test_default_pooling_of_a_decoder_is_that_of_sentence_transformers(
    tiny: ModelConfig, tmp_path: Path, causal: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    fields = {"vocab_size": 160, "num_key_value_heads": 2, "is_causal": causal, **SMALL}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **fields)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert_embeds_alike(str(tmp_path), padding_free=True)
    assert load_towers(str(tmp_path)).model[1].pooling_mode == ("lasttoken" if causal else "mean")
    assert build_towers(ModelConfig(name=str(tmp_path), pooling="cls")).model[1].pooling_mode == "cls"


def test_a_chat_template_is_refused_in_encoding(tiny: ModelConfig, tmp_path: Path) -> None:
    def chatty(tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"

    folder = encoder_folder(tiny, tmp_path / "chat", edit=chatty)
    refuse(folder, "chat template", load_towers)
    (tmp_path / "trained").mkdir()
    towers = build(folder)
    towers.save(tmp_path / "trained")
    np.testing.assert_allclose(ours(towers, "query"), theirs(str(tmp_path / "trained"), "query"), atol=2e-6)


def test_the_check_does_not_change_the_saved_tokenizer(encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    before = json.loads((Path(folder) / "tokenizer.json").read_text())
    (tmp_path / "trained").mkdir()
    build(folder).save(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "tokenizer.json").read_text()) == before
    assert len(TEXTS) == len(ours(load_towers(folder), "query"))
