"""Models whose embeddings would differ from sentence-transformers are refused on loading."""

from __future__ import annotations

import builtins
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_helpers import (
    SMALL,
    TEXTS,
    assert_embeds_alike,
    encoder_folder,
    model_folder,
    ours,
    rewrite,
    theirs,
    transformer,
)
from safetensors.torch import load_file, save_file
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

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.folder import load_vision_modules
from retriever.models.loading.missing_weights import collect_missing_weights
from retriever.models.towers import Towers, build_towers, load_towers


@pytest.fixture(scope="module")
def encoder(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_folder(tiny, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def build(folder: str) -> Towers:
    return build_towers(ModelConfig(name=folder))


def refuse(folder: str, message: str, *loads: Any) -> None:
    for load in loads or (load_towers, build):
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


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


def test_invalid_truncate_dim_is_refused(encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    for value in (0, -1, "8"):
        rewrite(Path(folder) / "config_sentence_transformers.json", truncate_dim=value)
        refuse(folder, f"truncate_dim: expected a number of dimensions above 0, found {value!r}")


def test_unknown_settings_of_modules_are_refused(encoder: str, tmp_path: Path) -> None:
    folder = Path(model_folder(tmp_path / "model", transformer(encoder), Pooling(32), Dense(32, 16)))
    cases = [
        ("2_Dense/config.json", {"gate": True}, r"2_Dense/config\.json: expected in_features, .*, found gate"),
        (
            "2_Dense/config.json",
            {"activation_function": "other.Swish"},
            "expected a module of torch, found other.Swish",
        ),
        ("1_Pooling/config.json", {"gate": True}, "unexpected keyword argument 'gate'"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "Invalid pooling mode: 'attention'"),
        ("sentence_bert_config.json", {"gate": True}, "unexpected keyword argument 'gate'"),
    ]
    for file, changes, message in cases:
        before = (folder / file).read_text()
        rewrite(folder / file, **changes)
        refuse(str(folder), message)
        (folder / file).write_text(before)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["kwargs"] = ["task"]
    (folder / "modules.json").write_text(json.dumps(modules))
    refuse(str(folder), r"modules\.json: kwargs task of module 1: not supported")


def test_custom_code_is_neither_run_nor_prompted_for(
    tiny: ModelConfig, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)
    code = "raise AssertionError('run')\n"
    named = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    for name, changes in (("new", {"model_type": "own", "auto_map": named}), ("over", {"auto_map": named})):
        folder = Path(encoder_folder(tiny, tmp_path / name))
        (folder / "own.py").write_text(code)
        rewrite(folder / "config.json", **changes)
        refuse(str(folder), r"the model has custom code, own\.OwnModel, which is not run")
        whole = Path(model_folder(tmp_path / f"{name}_st", transformer(encoder), Pooling(32)))
        (whole / "own.py").write_text(code)
        rewrite(whole / "config.json", **changes)
        refuse(str(whole), r"the model has custom code, own\.OwnModel, which is not run")
    # A class that is part of transformers under the same name is used.
    rewrite(tmp_path / "over" / "config.json", auto_map={"AutoModel": "own.BertModel"})
    assert_embeds_alike(str(tmp_path / "over"))
    folder = Path(model_folder(tmp_path / "module", transformer(encoder), Pooling(32)))
    (folder / "own.py").write_text(code)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0], {**modules[1], "type": "own.Pooling"}]))
    refuse(str(folder), r"modules\.json: the model has custom code, own\.Pooling, which is not run")
    routed = Router.for_query_document([transformer(encoder), Pooling(32)], [transformer(encoder), Pooling(32)])
    folder = Path(model_folder(tmp_path / "routed", routed))
    types = json.loads((folder / "router_config.json").read_text())["types"]
    rewrite(folder / "router_config.json", types={**types, "query_1_Pooling": "own.Pooling"})
    refuse(str(folder), r"router_config\.json: the model has custom code, own\.Pooling, which is not run")
    rewrite(tmp_path / "new" / "config.json", auto_map={"AutoConfig": "own.OwnConfig"})
    config = ModelConfig(image=dataclasses.replace(ModelConfig().image, name=str(tmp_path / "new")))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_vision_modules(config)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "num_key_value_heads: expected a divisor of 4 heads, found 32, the default"),
        ({"model_type": "qwen2", "num_key_value_heads": 3}, "expected a divisor of 4 heads, found 3$"),
        ({"model_type": "roberta", "type_vocab_size": 0}, "cannot embed texts"),
        ({"model_type": "vit"}, "expected a transformer of texts"),
        ({"model_type": "bert", "max_position_embeddings": 2}, "expected more than 2 positions"),
    ],
)
def test_an_architecture_that_cannot_embed_is_a_config_error(
    tiny: ModelConfig, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.architecture: .*{message}") as caught:
        build_towers(ModelConfig(architecture={**SMALL, **fields}, tokenizer=tiny.tokenizer))
    assert "\n" not in str(caught.value)


def test_frozen_weights_are_described_and_a_fully_frozen_model_is_refused(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers.base.modules import Transformer

    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    assert build(folder).describe_frozen() is None
    init = Transformer.__init__

    def frozen(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.requires_grad_(False)  # as adapters and their base models are loaded

    monkeypatch.setattr(Transformer, "__init__", frozen)
    with pytest.raises(ConfigError, match="every weight is frozen"):
        build(folder)
    towers = build_towers(ModelConfig(name=folder, projection=8))
    assert "; trained: 256" in (towers.describe_frozen() or "")


def test_an_adapter_without_its_package_is_refused(encoder: str, tmp_path: Path) -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        folder = Path(model_folder(tmp_path / "model", transformer(encoder), Pooling(32)))
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": encoder}))
        refuse(str(folder), "peft")
    else:
        pytest.skip("peft is installed")


def test_the_check_does_not_change_the_saved_tokenizer(encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    before = json.loads((Path(folder) / "tokenizer.json").read_text())
    (tmp_path / "trained").mkdir()
    build(folder).save(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "tokenizer.json").read_text()) == before
    assert len(TEXTS) == len(ours(load_towers(folder), "query"))


@pytest.mark.parametrize("silenced", [False, True])
def test_missing_weights_are_refused(
    silenced: bool, encoder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if silenced:
        request.addfinalizer(lambda: logging.disable(logging.NOTSET))
        logging.disable(logging.CRITICAL)
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    rewrite(Path(folder) / "config.json", num_hidden_layers=SMALL["num_hidden_layers"] + 2)
    refuse(folder, r"its files lack \d+ weights of the BertModel .*layer\.")
    assert logging.root.manager.disable == (logging.CRITICAL if silenced else logging.NOTSET)


def test_missing_weights_without_effect_are_accepted(encoder: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32))
    expected = theirs(folder, "query")
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    pooler = [name for name in weights if "pooler" in name]
    assert pooler
    save_file({name: weights[name] for name in weights if name not in pooler}, file, metadata={"format": "pt"})
    np.testing.assert_allclose(ours(load_towers(folder), "query"), expected, atol=2e-6)


def test_names_of_missing_weights_are_parsed_from_reports() -> None:
    with collect_missing_weights() as names:
        logging.getLogger("transformers.modeling_utils").warning(
            "Key | Status |\nlayer.{0, 1}.{key, value}.weight | \x1b[31mMISSING\x1b[0m | \n"
            "b | UNEXPECTED |\nc | MISSING |"
        )
    assert names == {*(f"layer.{n}.{kind}.weight" for n in (0, 1) for kind in ("key", "value")), "c"}
