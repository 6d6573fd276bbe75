"""The saved model has the prompts of the training sources; unsupported prompts are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import command, write_beir, write_lines
from folder_helpers import encoder_folder, model_folder, transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from retriever.config.data import DataConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.batches import Prompts
from retriever.data.source_prompts import describe_source_prompts, source_prompts
from retriever.errors import ConfigError
from retriever.evaluation.set_settings import AdjustedTowers, SetSettings
from retriever.training.run_dir import build_configured_towers


def source(path: str, query: str | None = None, passage: str | None = None) -> SourceConfig:
    return SourceConfig(path, query_prompt=query, passage_prompt=passage)


def build(model: ModelConfig, *sources: SourceConfig) -> Any:
    return build_configured_towers(TrainConfig(model=model, data=DataConfig(sources=sources)))


def test_a_prompt_of_all_sources_becomes_the_models(tiny: ModelConfig) -> None:
    sources = (source("a.jsonl", "ask: ", "text: "), source("b.jsonl", "ask: ", "text: "))
    towers = build(tiny, *sources)
    assert (towers.prompt("query"), towers.prompt("document")) == ("ask: ", "text: ")
    assert towers.model.prompts == {"query": "ask: ", "document": "text: "}
    assert describe_source_prompts(towers, sources) == [
        "query_prompt: 'ask: ' is saved as the model's prompt and used in evaluation",
        "passage_prompt: 'text: ' is saved as the model's prompt and used in evaluation",
    ]


def test_a_source_without_prompts_uses_the_models(tiny: ModelConfig) -> None:
    model = dataclasses.replace(tiny, query_prompt="own: ")
    sources = (source("a.jsonl"), source("b.jsonl", "own: "))
    towers = build(model, *sources)
    assert towers.prompt("query") == "own: "
    assert source_prompts(towers, sources) == [Prompts("own: ", ""), Prompts("own: ", "")]
    assert describe_source_prompts(build(model, sources[0]), sources[:1]) == []
    # An empty prompt of all sources replaces the model's.
    assert build(model, source("a.jsonl", "")).prompt("query") == ""


def test_different_prompts_are_saved_by_name(tiny: ModelConfig, tmp_path: Path) -> None:
    sources = (
        source("x/nq.jsonl.gz", "nq: ", "text: "),
        source("y/nq.csv", "other: ", "text: "),
        source("owner/msmarco:v2@main", "", "text: "),
    )
    towers = build(dataclasses.replace(tiny, query_prompt="own: "), *sources)
    assert towers.prompt("query") == "own: "
    towers.save(tmp_path)
    saved = json.loads((tmp_path / "config_sentence_transformers.json").read_text())["prompts"]
    assert saved == {"query": "own: ", "document": "text: ", "nq_query": "nq: ", "nq_query_2": "other: "}
    first, second = describe_source_prompts(towers, sources)
    assert first == (
        "query_prompt: sources differ; encoding and evaluation use the model's own, 'own: '; "
        "saved by name: nq_query, nq_query_2"
    )
    assert "'text: ' is saved as the model's prompt" in second
    # Building again from the folder, as after an interruption, changes nothing.
    again = build(ModelConfig(name=str(tmp_path)), *sources)
    assert again.model.prompts == towers.model.prompts


def test_prompts_excluded_by_the_pooling_are_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    encoder = encoder_folder(tiny, tmp_path / "encoder")
    folder = model_folder(tmp_path / "model", transformer(encoder), Pooling(32, include_prompt=False))
    model = ModelConfig(name=folder)
    for field, given in (
        ("query_prompt", source("a.jsonl", "q: ")),
        ("passage_prompt", source("a.jsonl", None, "p: ")),
    ):
        with pytest.raises(ConfigError, match=rf"data\.sources: a\.jsonl: {field}: .*leaves out its prompt"):
            build(model, source("b.jsonl"), given)
    towers = build(model, source("a.jsonl", "", ""))
    with pytest.raises(Exception, match="leaves out its prompt"):
        AdjustedTowers(towers, SetSettings(query_prompt="q: "))
    prompted = model_folder(
        tmp_path / "prompted",
        transformer(encoder),
        Pooling(32, include_prompt=False),
        prompts={"query": "q: "},
    )
    with pytest.raises(Exception, match="leaves out its prompt"):
        build(ModelConfig(name=prompted))
    assert build(ModelConfig(name=prompted, query_prompt="")).prompt("query") == ""


def test_a_run_saves_reports_and_evaluates_with_its_training_prompts(tiny: ModelConfig, tmp_path: Path) -> None:
    rows: list[object] = [{"query": f"what is {n}", "positive": f"the number {n}"} for n in range(8)]
    pairs, dev = write_lines(tmp_path / "pairs.jsonl", rows), write_beir(tmp_path / "dev")
    scores = {}
    # Prompts of all but one of the model's 64 tokens make all passages almost equal.
    for name, prompt in (("without", ""), ("with", "e" * 60)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            json.dumps(
                {
                    "out": str(tmp_path / name),
                    "model": {"architecture": tiny.architecture, "tokenizer": tiny.tokenizer},
                    "data": {
                        "sources": [{"path": str(pairs), "query_prompt": prompt, "passage_prompt": prompt}],
                        "workers": 0,
                    },
                    "dev": {"path": str(dev)},
                    "batch_size": 4,
                    "steps": 1,
                    "optim": {"lr": 1e-9},
                    "device": "cpu",
                }
            )
        )
        outcome = command("train", config)
        assert outcome.code == 0, outcome.err
        assert f"query_prompt: {prompt!r} is saved" in outcome.out + outcome.err
        saved = json.loads((tmp_path / name / "model" / "config_sentence_transformers.json").read_text())
        assert saved["prompts"] == {"query": prompt, "document": prompt}
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        scores[name] = next(row["dev_ndcg@10"] for row in rows if isinstance(row, dict) and "dev_ndcg@10" in row)
    assert scores["without"] != scores["with"]
