"""Devices: what this machine has is used, and what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import MEANINGS, command, write_config, write_pairs

import retriever
from index.files import InputError
from retriever.config.model import ModelConfig
from retriever.errors import ConfigError
from retriever.utils.device import (
    HostCopy,
    choose_device,
    choose_encoding_precision,
    choose_precision,
    loss_device,
    to_host,
)


@pytest.mark.parametrize("name", ["gpu", "cuda:-1", "mps:1", "", 0])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device: expected auto, cpu"):
        choose_device(name)


def test_gpus_of_intel_and_amd_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Intel GPUs are not supported"):
        choose_device("xpu")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(InputError, match=r"AMD GPUs .* are not supported: expected cpu"):
            choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_an_apple_gpu_computes_in_fp32_and_leaves_the_loss_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="'mps' is not on this machine"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = choose_device("mps")
    assert device.type == "mps" and choose_precision("auto", device) == choose_precision("fp32", device) == "fp32"
    with pytest.raises(ConfigError, match="precision: expected fp32 on mps, found bf16"):
        choose_precision("bf16", device)
    assert loss_device(device).type == "cpu" and loss_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_models_embed_in_fp32_on_cpus_and_in_bf16_on_gpus(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.utils.device._cpu_flags", lambda: {"amx_bf16"})
    assert choose_precision("auto", torch.device("cpu")) == "bf16"
    assert retriever.load(minilm, device="cpu").options.precision == "fp32"
    assert retriever.load(minilm, device="cpu", precision="bf16").options.precision == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_encoding_precision("auto", torch.device("cuda")) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_encoding_precision("auto", torch.device("cuda")) == "fp32"


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_an_apple_gpu_trains_and_embeds_as_the_cpu_does(tiny: ModelConfig, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    texts, found = list(MEANINGS.values()), []
    for device in ("cpu", "mps"):
        tiny_model = dataclasses.replace(tiny, dropout=0.0)
        config = write_config(
            tmp_path / f"{device}.yaml", tiny_model, pairs, device=device, steps=3, optim={"lr": 1e-4}
        )
        assert (outcome := command("train", config)).code == 0, outcome.err
        found.append(retriever.load(tmp_path / device / "model", device=device).encode_passages(texts))
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_copies_to_the_host_of_a_cpu_tensor_share_its_memory() -> None:
    tensor = torch.arange(3.0)
    assert to_host(tensor) is tensor and HostCopy(tensor).array().tolist() == [0, 1, 2]
