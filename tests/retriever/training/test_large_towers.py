"""LoRA and decoders as embedding models: what is trained and saved, and that a run resumes."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import write_beir
from run_helpers import assert_same, results
from safetensors.torch import load_file

import retriever
from index.progress import SilentReporter
from retriever.config.dev import DevConfig
from retriever.config.lora import LoraConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import load_config
from retriever.errors import ConfigError
from retriever.models.loading.lora import add_lora
from retriever.models.loading.quantized_linear import QuantizedLinear
from retriever.models.modality import build_towers
from retriever.models.towers import Towers
from retriever.training import cuda_graphs
from retriever.training.step import TrainStep
from retriever.training.trainer import Trainer
from retriever.utils.device import Precision
from retriever.utils.interrupt import Interrupted
from scripts import ROOT

TEXTS = ["a cat", "the red house by the river is small", "x"]
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def base(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small decoder like Qwen3 with random weights, whose tokenizer does not append EOS."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "tokenizer")
    config = ModelConfig(architecture=QWEN, tokenizer=str(folder / "tokenizer"))
    towers = build_towers(config)
    with torch.no_grad():
        for weight in towers.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # so that the embeddings of texts differ
    (folder / "model").mkdir()
    towers.save(folder / "model")
    return str(folder / "model")


@pytest.fixture
def config(base: str, tmp_path: Path) -> TrainConfig:
    data = str(write_beir(tmp_path / "words"))
    recipe = load_config(ROOT / "scripts" / "recipes" / "qwen3_embedding.yaml")
    return dataclasses.replace(
        recipe,
        out=str(tmp_path / "run"),
        model=dataclasses.replace(recipe.model, name=base, max_length=64, query_prompt="find: "),
        data=dataclasses.replace(recipe.data, sources=(SourceConfig(path=data),), workers=0),
        dev=DevConfig(path=data, every=10, at_start=False),
        optim=dataclasses.replace(recipe.optim, lr=1e-2, ema=0.5),
        batch_size=8,
        steps=4,
        micro_batch_tokens=128,
        checkpoint_every=2,
        keep_checkpoints=1,
        log_every=1,
        precision="fp32",
    )


def test_the_recipe_trains_updates_merges_them_and_resumes(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    trainer = Trainer.start(whole, SilentReporter())
    before = {name: tensor.clone() for name, tensor in trainer.towers.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in trainer.towers.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed == {name for name, p in trainer.towers.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in changed)
    # The folder is an ordinary model with the embeddings of the averaged updates, and appends EOS.
    folder = tmp_path / "whole" / "model"
    names = load_file(folder / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in names)
    with trainer.components.evaluated_weights():
        towers: Towers = trainer.towers.eval()
        with torch.no_grad():
            tokens = towers.tokenizer("document")(TEXTS)
            expected = towers.embed(tokens, np.arange(3), "document").numpy()
    assert all(ids[-1] == towers.tokenizer("document").tokenizer.eos_token_id for ids in token_lists(tokens))
    found = retriever.load(folder)
    np.testing.assert_allclose(found.encode_passages(TEXTS), expected, atol=2e-6)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(model.encode_document(TEXTS), expected, atol=2e-6)
    np.testing.assert_allclose(model.encode_query(TEXTS), found.encode_queries(TEXTS), atol=2e-6)

    _stop_at_step(2, monkeypatch)
    with pytest.raises(Interrupted):
        Trainer.start(config, SilentReporter()).train()
    monkeypatch.undo()
    Trainer.resume(Path(config.out), SilentReporter()).train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))


def _stop_at_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop, as a scheduler does, when it reaches a step."""
    step = TrainStep.__call__

    def stopped(train_step: TrainStep, batch: Any, current: int, **options: Any) -> Any:
        if current == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(train_step, batch, current, **options)

    monkeypatch.setattr(TrainStep, "__call__", stopped)


def token_lists(tokens: Any) -> list[list[int]]:
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def test_an_adapter_and_a_bf16_base_give_the_same_model(config: TrainConfig, tmp_path: Path) -> None:
    lora = dataclasses.replace(config.model.lora, save="adapter", targets=("q_proj", "v_proj"))
    bf16 = dataclasses.replace(
        config, steps=2, precision="bf16", dev=DevConfig(), model=dataclasses.replace(config.model, lora=lora)
    )
    trainer = Trainer.start(bf16, SilentReporter())
    dtypes = {("lora_" in name): p.dtype for name, p in trainer.towers.encoders[0].named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    adapted = {name.split(".")[-4] for name, p in trainer.towers.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}
    trainer.train()
    folder = tmp_path / "run" / "model"
    assert sorted(path.name for path in folder.rglob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not list(folder.rglob("model.safetensors"))
    from sentence_transformers import SentenceTransformer

    vectors = retriever.load(folder).encode_passages(TEXTS)
    np.testing.assert_allclose(
        SentenceTransformer(str(folder), device="cpu").encode_document(TEXTS), vectors, atol=2e-6
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_of_4_bits_trains_resumes_and_is_merged(
    config: TrainConfig, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    lora = dataclasses.replace(config.model.lora, base="nf4")
    model = dataclasses.replace(config.model, lora=lora)
    config = dataclasses.replace(config, precision=precision, dev=DevConfig(), model=model)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    trainer = Trainer.start(whole, SilentReporter())
    layers = [m for m in trainer.towers.modules() if isinstance(m, QuantizedLinear)]
    linear = trainer.towers.encoders[0].layers[0].mlp.gate_proj.base_layer
    assert len(layers) == 2 * 7 and linear in layers
    stored = sum(buffer.numel() * buffer.element_size() for buffer in (linear.packed, linear.absmax))
    assert stored == linear.in_features * linear.out_features * 4.5 / 8
    dtypes = {("lora_" in name): p.dtype for name, p in trainer.towers.encoders[0].named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.float32 if precision == "fp32" else torch.bfloat16}
    trainer.train()
    with trainer.components.evaluated_weights(), torch.no_grad():
        towers: Towers = trainer.towers.eval()
        expected = towers.embed(towers.tokenizer("document")(TEXTS), np.arange(3), "document").float().numpy()
    folder = tmp_path / "whole" / "model"
    assert not any("packed" in name for name in load_file(folder / "model.safetensors"))
    found = retriever.load(folder).encode_passages(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-6 if precision == "fp32" else 2e-2)

    _stop_at_step(2, monkeypatch)
    with pytest.raises(Interrupted):
        Trainer.start(config, SilentReporter()).train()
    monkeypatch.undo()
    Trainer.resume(Path(config.out), SilentReporter()).train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))


def test_settings_that_do_not_fit_a_base_of_4_bits_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, base="nf4"))
    for change in ({"shard_towers": True}, {"precision": "fp16"}, {"compile": True}):
        with pytest.raises(ValueError, match=r"model\.lora\.base: expected .*, found nf4"):
            dataclasses.replace(config, model=model, **change)
    with pytest.raises(ValueError, match=r"model\.lora\.rank: expected at least 1 with model\.lora\.base nf4"):
        LoraConfig(base="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r'pip install "dense-retriever\[qlora\]"'):
        Trainer.start(dataclasses.replace(config, model=model), SilentReporter())


def test_attention_in_both_directions_is_saved_and_packs(base: str, tmp_path: Path) -> None:
    towers = build_towers(ModelConfig(name=base, bidirectional=True, append_eos=True, pooling="mean")).eval()
    causal = build_towers(ModelConfig(name=base, append_eos=True, pooling="mean")).eval()
    tokens = towers.tokenizer("query")(TEXTS)
    rows = np.arange(len(TEXTS))
    with torch.no_grad():
        expected = towers.embed(tokens, rows, "query")
        assert not torch.allclose(expected[:2], causal.embed(tokens, rows, "query")[:2], atol=1e-3)
        towers.save(tmp_path)
        saved = build_towers(ModelConfig(name=str(tmp_path))).eval()
        torch.testing.assert_close(saved.embed(tokens, rows, "query"), expected, rtol=0, atol=2e-6)
        for each in (towers, saved):
            assert each.enable_packing()
            torch.testing.assert_close(each.embed(tokens, rows, "query"), expected, rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_cuda_graphs_do_not_change_training_with_lora(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, losses = [], []
    release = cuda_graphs.GraphedForward.release

    def count_and_release(graphed: cuda_graphs.GraphedForward) -> None:
        captured.append(len(graphed.captures))
        release(graphed)

    monkeypatch.setattr(cuda_graphs.GraphedForward, "release", count_and_release)
    for graphs in (False, True):
        run = dataclasses.replace(
            config,
            out=str(tmp_path / f"graphs{graphs}"),
            device="cuda",
            precision="bf16",
            cuda_graphs=graphs,
            dev=DevConfig(),
            loss=dataclasses.replace(config.loss, logit_scale=20.0),
        )
        trainer = Trainer.start(run, SilentReporter())
        dtypes = {p.dtype for p in trainer.towers.encoders[0].parameters() if not p.requires_grad}
        assert dtypes == {torch.bfloat16}
        trainer.train()
        losses.append([row["loss"] for row in results(trainer.run)["rows"] if "loss" in row])
    assert captured and all(captured)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


def test_what_cannot_be_adapted_is_refused_by_name(
    tiny: ModelConfig, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: .*nothing"):
        build_towers(ModelConfig(name=base, lora=LoraConfig(rank=2, targets=("nothing",))))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: expected linear layers, found embed_tokens"):
        build_towers(ModelConfig(name=base, lora=LoraConfig(rank=2, targets=("embed_tokens",))))
    with pytest.raises(ConfigError, match=r"model\.bidirectional: expected one of llama, .*found bert"):
        build_towers(dataclasses.replace(tiny, bidirectional=True))
    with pytest.raises(ValueError, match=r"model\.lora\.save: expected merged for a model from scratch"):
        dataclasses.replace(tiny, lora=LoraConfig(rank=2, save="adapter"))
    with pytest.raises(ValueError, match=r"model\.lora\.base: expected auto or fp32 with shard_towers"):
        TrainConfig(shard_towers=True, model=ModelConfig(lora=LoraConfig(rank=2, base="bf16")))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "dense-retriever\[lora\]"'):
        add_lora([], LoraConfig(rank=2))
