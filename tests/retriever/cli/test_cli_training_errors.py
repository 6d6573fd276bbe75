"""Mistakes in the arguments, configuration and data of a training run end in one line and the right exit code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Outcome, assert_refused, command, disk_of, write_config, write_lines

from retriever.config.model import ModelConfig

ROW = {"question": "what is a cat?", "answer": "a small animal", "wrong": ["a tool"]}


def trained_with(tmp_path: Path, tiny: ModelConfig, rows: list[object], **other: object) -> Outcome:
    return command("train", write_config(tmp_path / "run.yaml", tiny, write_lines(tmp_path / "p.jsonl", rows), **other))


@pytest.mark.parametrize(
    ("environment", "pattern"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number of processes, as torchrun sets it, found 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, as under torchrun, but: .* RANK expected, but not set"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "WORLD_SIZE is set, as under torchrun, but: .*'x'"),
    ],
)
def test_half_of_what_torchrun_sets_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], pattern: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(command("train"), 2, f"^retriever: {pattern}")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("batch_sise: 4", ["run.yaml: batch_sise: unknown key; did you mean 'batch_size'"]),
        ("optim:\n  lrr: 1", [r"run.yaml: optim\.lrr: unknown key; did you mean 'lr'"]),
        ("data:\n  sources:\n    - {path: a, querry: b}", [r"data\.sources\[0\]\.querry: .*'query'"]),
        ("batch_size: many", ["batch_size: expected int, found 'many'"]),
        ("batch_size: true", ["batch_size: expected int, found True"]),
        ("batch_size: 0", ["run.yaml: batch_size: expected at least 1, found 0"]),
        ("optim: 3", ["run.yaml: optim: expected keys and values, found 3"]),
        ("optim: {betas: [0.9]}", [r"optim\.betas: expected 2 values, found 1"]),
        ("data: {sources: a.jsonl}", [r"data\.sources: expected a list, found 'a.jsonl'"]),
        ("loss: {name: clop}", [r"loss\.name: expected one of inf_cl, sigmoid, clip, found 'clop'"]),
        ("loss: {logit_scale: 500}", [r"run.yaml: loss\.logit_scale: .* found 500"]),
        ("a: [1\nb: 2", [r"run.yaml:2: expected YAML"]),
        ("batch_size: 8\noptim:\n  lr: 1\n  lr: 2", [r"run.yaml:4: expected YAML, found: lr twice"]),
        ("- a\n- b", ["run.yaml: the file: expected keys and values"]),
        ("just text", ["run.yaml: the file: expected keys and values"]),
    ],
)
def test_bad_configuration_ends_with_2_and_names_file_and_key(tmp_path: Path, text: str, patterns: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    outcome = command("train", path)
    assert_refused(outcome, 2, str(tmp_path), *patterns)
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "other", "patterns"),
    [
        ([ROW] * 5 + ['{"question": "cut'], {}, [r"p\.jsonl:6: expected JSON"]),
        ([ROW] * 5 + ["[1, 2]"], {}, [r"p\.jsonl:6: expected a JSON object, found list"]),
        ([ROW] * 5 + [{"question": 7, "answer": "b"}], {}, [r"p\.jsonl:6: expected text .*'question', found int"]),
        (
            [ROW] * 5 + [{"query": "a", "answer": "b"}],
            {},
            [r"p\.jsonl:6: expected a column 'question', found query, answer"],
        ),
        ([], {}, [r"p\.jsonl: expected"]),
        (
            [{**ROW, "question": " "}] * 3,
            {},
            [r"p\.jsonl: expected at least one example", r"empty query: 3 \(first at .*:1\)"],
        ),
        ([ROW] * 9, {"batch_size": 10}, [r"p\.jsonl: expected at least 10 rows \(batch_size\), found 9"]),
    ],
)
def test_bad_training_data_is_named_by_line(
    tmp_path: Path, tiny: ModelConfig, rows: list[object], other: dict[str, object], patterns: list[str]
) -> None:
    assert_refused(trained_with(tmp_path, tiny, rows, **{"batch_size": 2, **other}), 1, *patterns)
    # No run that `--resume` would take for one.
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert_refused(command("train", "--resume", tmp_path / "run"), 1, "expected the folder of a run")


def test_empty_and_huge_texts_are_counted_and_training_goes_on(tmp_path: Path, tiny: ModelConfig) -> None:
    rows: list[object] = [ROW, {**ROW, "answer": ""}, {**ROW, "answer": "word " * 250_000}, {**ROW, "question": "dog?"}]
    outcome = trained_with(tmp_path, tiny, rows, batch_size=2, epochs=1)
    assert outcome.code == 0, outcome.err
    assert re.search(r"p\.jsonl: rows skipped for an empty positive: 1 \(first at .*:2\)", outcome.err)
    assert re.search(r"p\.jsonl: texts of more than 1 MiB.*: 1 \(first at .*:3\)", outcome.err)


def test_missing_training_file(tmp_path: Path, tiny: ModelConfig) -> None:
    config = write_config(tmp_path / "run.yaml", tiny, tmp_path / "gone.jsonl")
    assert_refused(command("train", config), 1, r"gone\.jsonl: [Nn]o such file")


def test_training_without_model_or_data_says_what_to_give(tmp_path: Path, tiny: ModelConfig) -> None:
    assert_refused(command("train", "--out", tmp_path / "a"), 2, r"model\.name")
    path = write_config(tmp_path / "run.yaml", tiny, tmp_path / "none", data={"workers": 0})
    assert_refused(command("train", path), 2, r"data\.sources: expected at least one")


@pytest.mark.parametrize(
    ("unknown", "known"),
    [("loss.hardnes", "loss.hardness"), ("loss.limt.share", "loss.limit.share"), ("optim.lrr", "optim.lr")],
)
def test_the_nearest_flag_is_proposed_beside_those_of_a_source(world: Any, unknown: str, known: str) -> None:
    outcome = command("train", world.config, f"--{unknown}", 3)
    assert_refused(outcome, 2, rf"--{re.escape(unknown)}.*; did you mean --{re.escape(known)}\?")


def test_existing_run_is_not_overwritten(world: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.run.rglob("*")}
    assert_refused(command("train", world.config), 1, f"{world.run}: holds a run already", "--resume")
    assert {path: path.stat().st_mtime_ns for path in world.run.rglob("*")} == before


def test_run_is_not_begun_among_other_files(world: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "thesis.txt").write_text("the only copy")
    outcome = command("train", world.config, "--out", mine, "--steps", 1)
    assert (mine / "model" / "thesis.txt").exists()
    assert_refused(outcome, 1, f"{mine}: ")


@pytest.mark.parametrize("size", [1000, 20_000, 100_000])
def test_full_disk_while_training(world: Any, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    with disk_of(size):
        assert_refused(command("train", world.config, "--out", out, "--steps", 2), 1, "File too large")
    assert not (out / "model").exists()
    again = ("train", "--resume", out) if (out / "config.yaml").exists() else ("train", world.config, "--out", out)
    outcome = command(*again)
    assert outcome.code == 0, outcome.err
