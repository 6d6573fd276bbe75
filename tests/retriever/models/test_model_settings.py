"""Settings and weights of a model that cannot be honored are refused on loading."""

from __future__ import annotations

import builtins
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_helpers import (
    SMALL,
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
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Pooling,
)

from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.models.images.folder import load_vision_modules
from retriever.models.loading.missing_weights import collect_missing_weights
from retriever.models.modality import build_towers, load_towers


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
