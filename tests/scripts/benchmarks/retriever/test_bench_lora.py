"""The benchmark of LoRA trains the same model with both libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retriever.config.model import ModelConfig
from scripts.benchmarks.result_rows import read_rows
from scripts.benchmarks.retriever import bench_lora

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}


@pytest.mark.slow
def test_both_libraries_have_the_same_first_loss(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_lora, "SHAPE", {**bench_lora.SHAPE, **SMALL})
    words = ["bench_lora", "--device", "cpu", "--tokenizer", tiny.tokenizer, "--vocabulary", "200", "--layers", "2"]
    words += ["--rank", "2", "--batch", "8", "--steps", "3", "--their-tokens", "512", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--results", str(tmp_path)])
    bench_lora.main()
    ours, theirs = read_rows(tmp_path / "lora.csv")
    assert abs(float(ours["first_loss"]) - float(theirs["first_loss"])) < 1e-3
    assert float(ours["pairs_per_second"]) > 0 and int(ours["planned_mib"]) > 0
