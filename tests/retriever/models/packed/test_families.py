"""Packed towers give the embeddings and gradients of padded ones, for every supported family."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch

from retriever.config.model import ModelConfig
from retriever.models.modality import build_towers
from retriever.models.packed import families, sublayers
from retriever.models.towers import Towers

# Special tokens inside a text, including pad tokens, are treated like other tokens.
TEXTS = [
    "a",
    "a longer text of several words, that goes on and on",
    "b c",
    "",
    "words " * 20,
    "x [PAD] y [SEP] [PAD] z",
]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "xlm-roberta": SMALL,
    "camembert": SMALL,
    "mpnet": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "modernbert": {**SMALL, "local_attention": 16, "global_attn_every_n_layers": 2},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 20},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
}


def towers_of(kind: str, tiny: ModelConfig, **settings: Any) -> Towers:
    torch.manual_seed(0)
    config = ModelConfig(architecture={"model_type": kind, **ARCHITECTURES[kind]}, tokenizer=tiny.tokenizer, **settings)
    return build_towers(config)


def outcome(towers: Towers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    towers.zero_grad()
    tokens = towers.tokenizer("query")(TEXTS)
    embeddings = towers.embed(tokens, np.array([4, 0, 3, 1, 5, 2]), "query")
    # With equal weights of the columns, the gradient of a mean before a LayerNorm would vanish.
    (embeddings * torch.linspace(-1, 1, embeddings.shape[1], device=embeddings.device)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}
    return embeddings.detach(), gradients


def test_all_supported_families_are_tested() -> None:
    assert {*families.ENCODERS, *families.DECODERS, "mpnet"} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_and_gradients_equal_padded_ones(kind: str, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    towers = towers_of(
        kind, tiny, dropout=0.0, pooling="lasttoken" if kind in families.DECODERS else "mean", projection=8
    )
    padded, padded_gradients = outcome(towers)
    fingerprint = towers.fingerprint()
    assert towers.enable_packing()
    embeddings, gradients = outcome(towers)
    torch.testing.assert_close(embeddings, padded, rtol=0, atol=1e-6)
    # Unused weights have zero gradients in the padded path and none in the other.
    for name in padded_gradients:
        expected = padded_gradients[name]
        found = gradients.get(name, torch.zeros_like(expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert towers.fingerprint() == fingerprint


def assert_bare_equals_padded(towers: Towers) -> None:
    with torch.no_grad():
        tokens = towers.eval().tokenizer("query")(TEXTS)
        padded = towers.embed(tokens, np.arange(len(TEXTS)), "query")
        assert towers.enable_packing()
        torch.testing.assert_close(towers.embed(tokens, np.arange(len(TEXTS)), "query"), padded, rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "window"),
    [(kind, window) for kind in families.DECODERS for window in (None, 1, 4) if kind != "llama" or window is None],
)
def test_attention_windows_of_decoders_equal_padded_ones(
    kind: str, window: int | None, causal: bool, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # Only the second of two layers has the window.
    windowed = {"use_sliding_window": True, "max_window_layers": 1} if window and kind != "mistral" else {}
    settings = {**GROUPED, **windowed, "sliding_window": window, "is_causal": causal}
    monkeypatch.setitem(ARCHITECTURES, kind, settings)
    towers = towers_of(kind, tiny, pooling="mean")
    with torch.no_grad():
        for weight in towers.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that attention is uneven, and a single token makes a difference
    assert_bare_equals_padded(towers)


@pytest.mark.parametrize("local_attention", [1, 2, 5])
def test_attention_windows_of_modernbert_equal_padded_ones(
    local_attention: int, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = {**ARCHITECTURES["modernbert"], "local_attention": local_attention}
    monkeypatch.setitem(ARCHITECTURES, "modernbert", settings)
    assert_bare_equals_padded(towers_of("modernbert", tiny))


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_the_embedding_of_a_text_without_tokens_is_zero(
    pooling: Any, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    towers = towers_of("qwen3", tiny, pooling=pooling)
    for transformer in towers.transformers:
        transformer.processing_kwargs = {"text": {"add_special_tokens": False}}
    tokens = towers.tokenizer("query")(["", "a"])
    assert tokens.lengths.tolist() == [0, 1]
    assert_bare_equals_padded(towers)
    with torch.no_grad():
        assert towers.embed(tokens, np.arange(2), "query").norm(dim=1).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"module_output_name": "sentence_embedding"}, "another output"),
        ({"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}}, "a layer"),
    ],
)
def test_encoders_with_other_outputs_stay_padded(changed: dict[str, Any], message: str, tiny: ModelConfig) -> None:
    towers = towers_of("bert", tiny)
    for name, value in changed.items():
        setattr(towers.transformers[0], name, value)
    assert not towers.enable_packing(), message


def test_modules_that_mix_tokens_stay_padded(tiny: ModelConfig) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import CNN, Dense, Pooling, WeightedLayerPooling

    def chain(*modules: Any) -> bool:
        model = SentenceTransformer(modules=[*towers_of("bert", tiny).transformers, *modules], device="cpu")
        return Towers(model).enable_packing()

    read = {"module_input_name": "token_embeddings"}
    assert chain(Dense(32, 16, **read), Pooling(16))
    assert not chain(CNN(32, 16, [3]), Pooling(16))
    assert not chain(WeightedLayerPooling(32, 2, 1), Pooling(32))
    assert not chain(Pooling(32), CNN(32, 16, [3]))
    assert not chain(Pooling(32), Pooling(32))


@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("roberta", "xlm-roberta", "camembert")),
        "mpnet",
    ],
)
def test_fused_sublayers_change_neither_outputs_nor_gradients(
    kind: str, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whole, calls = sublayers.residual_norm, []

    def counted(*args: Any, **settings: Any) -> torch.Tensor:
        calls.append(settings)
        return whole(*args, **settings)

    monkeypatch.setattr(sublayers, "residual_norm", counted)
    towers = towers_of(kind, tiny, dropout=0.0)
    padded, padded_gradients = outcome(towers)
    assert not calls and towers.enable_packing()
    embeddings, gradients = outcome(towers)
    # Of two layers; MPNet ends its attention in a module that is not made of these parts.
    assert len(calls) == (2 if kind == "mpnet" else 4)
    torch.testing.assert_close(embeddings, padded, rtol=0, atol=2e-6)
    for name, expected in padded_gradients.items():
        found = gradients.get(name, torch.zeros_like(expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_packing_does_not_change_saved_towers(
    pooling: Any, tiny: ModelConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    towers = towers_of("bert", tiny, pooling=pooling, shared=False).eval()
    assert towers.enable_packing()
    tokens = towers.tokenizer("query")(TEXTS)
    with torch.no_grad():
        found = {side: towers.embed(tokens, np.arange(len(TEXTS)), side).numpy() for side in ("query", "document")}
    towers.save(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode_query(TEXTS), found["query"], atol=1e-6)
    np.testing.assert_allclose(model.encode_document(TEXTS), found["document"], atol=1e-6)


def test_an_unknown_family_and_an_unknown_pooling_stay_padded(tiny: ModelConfig) -> None:
    settings = {"model_type": "electra", "embedding_size": 16, **SMALL}
    towers = build_towers(ModelConfig(architecture=settings, tokenizer=tiny.tokenizer))
    attention = towers.encoders[0].config._attn_implementation
    assert not towers.enable_packing() and not towers.padding_free
    assert towers.encoders[0].config._attn_implementation == attention

    towers = towers_of("bert", tiny)
    towers.model[1].pooling_mode = "max"
    assert not towers.enable_packing()


def test_padding_on_a_gpu_is_described(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    electra = build_towers(
        ModelConfig(architecture={"model_type": "electra", "embedding_size": 16, **SMALL}, tokenizer=tiny.tokenizer)
    )
    bert = towers_of("bert", tiny)
    electra.enable_packing()
    assert electra.describe_padding() is None  # a CPU pads every family
    monkeypatch.setattr(Towers, "device", torch.device("cuda"))
    assert "packed sequences are not supported for electra" in (electra.describe_padding() or "")
    bert.enable_packing()
    assert bert.describe_padding() is None


@pytest.mark.parametrize(("kind", "kinds_of_layers"), [("bert", 1), ("modernbert", 3)])
def test_compiled_layers_are_not_recompiled_for_other_sizes(
    kind: str, kinds_of_layers: int, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(ARCHITECTURES, kind, {**ARCHITECTURES[kind], "num_hidden_layers": 4})
    towers = towers_of(kind, tiny)
    assert towers.enable_packing()
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    towers.compile_layers()
    tokenizer = towers.tokenizer("query")
    for training, texts in ((True, 3), (True, 5), (False, 4)):
        towers.train(training)
        tokens = tokenizer(["ab " * (1 + row % 3) for row in range(texts)])
        for graph in (True, False) if training else (False,):
            with torch.set_grad_enabled(graph):
                towers.embed(tokens, np.arange(texts), "query")
    assert counter.frame_count == 3 * kinds_of_layers


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_equal_padded_ones_up_to_rounding_on_a_gpu(kind: str, tiny: ModelConfig) -> None:
    from retriever.models.mixed_precision import mixed_precision

    towers = towers_of(kind, tiny, dropout=0.0, pooling="lasttoken" if kind in families.DECODERS else "mean").cuda()
    with torch.no_grad():
        tokens = towers.tokenizer("query")(TEXTS)
        everything = np.arange(len(TEXTS))
        exact = towers.embed(tokens, everything, "query")
        with torch.autocast("cuda", torch.bfloat16):
            padded = towers.embed(tokens, everything, "query")
        bare = copy.deepcopy(towers)
        assert bare.enable_packing()
        torch.testing.assert_close(bare.embed(tokens, everything, "query"), exact, rtol=0, atol=1e-5)
        with mixed_precision(bare, "bf16"):
            found = bare.embed(tokens, everything, "query")
    # Three times the error of the padded path in bf16, plus rounding.
    assert float((found - exact).abs().max()) < 3 * float((padded - exact).abs().max()) + 0.01
