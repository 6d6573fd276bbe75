"""A saved configuration loads equal, and invalid settings are refused by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import command

from retriever.cli.command_line import _parse
from retriever.config.data import DataConfig
from retriever.config.dev import DevConfig
from retriever.config.images import ImageConfig, ImageSource
from retriever.config.loss import LossConfig
from retriever.config.loss_options import LimitConfig, MatryoshkaConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import load_config, save_config, with_absolute_paths
from retriever.errors import ConfigError

FULL = TrainConfig(
    out="runs/ä ö",
    model=ModelConfig(
        name="m",
        architecture={"model_type": "bert", "hidden_size": 8},
        pooling="cls",
        dropout=0.5,
        query_prompt="query: ",
        image=ImageConfig(name="tiny", lock="text", patch_dropout=0.5),
    ),
    data=DataConfig(
        sources=(
            SourceConfig(path="a.jsonl", query="q", weight=2.5),
            SourceConfig(path="b", format="beir", weight=1.0),
        ),
        images=(ImageSource(path="shard-{0..3}.tar", caption=("txt", "json:alt"), weight=2.0),),
        negatives=3,
        cache="c",
    ),
    loss=LossConfig(
        name="clip",
        logit_scale=1 / 3,
        learn_logit_scale=True,
        limit=LimitConfig(margin=-0.1, share=0.95),
        matryoshka=MatryoshkaConfig((16, 32), (1.0, 0.5)),
    ),
    optim=OptimConfig(name="adafactor", lr=1e-5, betas=(0.9, 0.95), eps=1e-30, max_grad_norm=None),
    dev=DevConfig(path="d", every=7, patience=2),
    batch_size=7,
    epochs=0.1,
    steps=3,
    precision="bf16",
    micro_batch_tokens=100,
    tensorboard=True,
)


def read(path: Path, text: str) -> TrainConfig:
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("config", [TrainConfig(), FULL])
def test_a_saved_configuration_loads_equal(tmp_path: Path, config: TrainConfig) -> None:
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert "!!python" not in path.read_text()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path / "c.yaml", "# nothing yet\n") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("'0.25'", 0.25), ("2", 2.0), ("5e1", 50.0)],
)
def test_float_fields_accept_common_notations(tmp_path: Path, text: str, expected: float) -> None:
    lr = read(tmp_path / "c.yaml", f"optim: {{lr: {text}}}").optim.lr
    assert lr == expected and isinstance(lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "batchsize: unknown key; did you mean 'batch_size'"),
        ("model: {max_len: 3}", "model.max_len: unknown key; did you mean 'max_length'"),
        (
            "data: {sources: [{path: a, positives: b}]}",
            "data.sources[0].positives: unknown key; did you mean 'positive'",
        ),
        ("zzz: 3", "zzz: unknown key; known: out, model, data"),
        ("3: 3", "3: unknown key"),
        ("steps: 1.5", "steps: expected int, found 1.5 (float)"),
        ("steps: '5'", "steps: expected int, found '5' (str)"),
        ("steps: true", "steps: expected int, found True (bool)"),
        ("epochs: true", "epochs: expected float, found True (bool)"),
        ("optim: {lr: fast}", "optim.lr: expected float, found 'fast' (str)"),
        ("optim: {lr: [1]}", "optim.lr: expected float, found [1] (list)"),
        ("tensorboard: 1", "tensorboard: expected bool, found 1 (int)"),
        ("out: 3", "out: expected str, found 3 (int)"),
        ("out: null", "out: expected str, found None (NoneType)"),
        ("model: {architecture: bert}", "model.architecture: expected dict, found 'bert' (str)"),
        ("model: null", "model: expected keys and values, found None (NoneType)"),
        ("optim: {betas: [0.9, 0.99, 0.999]}", "optim.betas: expected 2 values, found 3"),
        ("optim: {betas: [0.9, x]}", "optim.betas[1]: expected float, found 'x' (str)"),
        ("optim: {betas: 0.9}", "optim.betas: expected a list, found 0.9 (float)"),
        ("precision: fp8", "precision: expected one of auto, fp32, bf16, fp16, found 'fp8' (str)"),
        ("data: {sources: [{query: a}]}", "path"),
        ("data: {sources: [a.jsonl]}", "data.sources[0]: expected keys and values, found 'a.jsonl' (str)"),
        ("data: {sources: [{path: a, weight: -1}]}", "weight: expected a positive number, found -1.0"),
        ("data: {sources: [{path: a, weight: 1}, {path: b}]}", "expected a weight for every source or for none, found"),
        ("data: {images: [{path: a}, {path: b, weight: 1}]}", "expected a weight for every source or for none, found"),
        ("data: {workers: -1}", "data.workers: expected at least 0, found -1"),
        ("epochs: .inf", "epochs: expected a positive number, found inf"),
        ("seed: -1", "seed: expected at least 0, found -1"),
        ("keep_checkpoints: 0", "keep_checkpoints: expected at least 1, found 0"),
        ("optim: {lr: 1" + "0" * 400 + "}", "optim.lr: expected float"),
        ("data: {workers: 1000000000000}", "data.workers: expected at most 1,024, found 1000000000000"),
        ("steps: 1000000001", "steps: expected at most 100,000,000, found 1000000001"),
        ("batch_size: 0x" + "f" * 5000, "batch_size: expected at most 2,147,483,647, found one of 2^128 or more"),
        ("log_every: '0x" + "f" * 5000 + "'", "log_every: expected int"),
        ("out: 0x" + "f" * 5000, "out: expected str, found a number of 20000 bits"),
        ("model: {architecture: {model_type: bert, 5: 7}}", "model.architecture: expected text as key, found 5 (int)"),
        ("model: {architecture: {a: [2026-01-01]}}", "model.architecture.a[0]: expected text, a number"),
        ("optim: {warmup_fraction: 2}", "optim.warmup_fraction: expected a fraction from 0 to 1, found 2.0"),
    ],
)
def test_invalid_values_are_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError) as error:
        read(path, text)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_invalid_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"c\.yaml:3: expected YAML"):
        read(path, "out: a\nsteps: 3\n  seed: 4\n")
    path.write_bytes(b"out: \xff\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: expected UTF-8"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="found a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2026-13-45", ":1: expected YAML, found: '2026-13-45', which is no timestamp"),
        ("out: a\nseed: !!int x", ":2: expected YAML, found: 'x', which is no int"),
        ("seed: !!int ''", ":1: expected YAML, found: '', which is no int"),
        ("compile: !!bool maybe", ":1: expected YAML, found: 'maybe', which is no bool"),
        ("seed: !!timestamp x", ":1: expected YAML, found: 'x', which is no timestamp"),
        ("seed: " + "9" * 5000, ":1: expected YAML, found: '999"),
        ("seed: " + "[" * 3000, ":1: expected YAML, found: more than 50 levels"),
        ("seed: &a [*a]", ": expected at most 100,000 values"),
        (
            "seed:\n - &a0 ["
            + ",".join(["x"] * 9)
            + "]\n"
            + "".join(f" - &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
            ": expected at most 100,000 values, found aliases that give more",
        ),
        ("out: a # " + "x" * 2**18, ": expected at most 262,144 bytes"),
    ],
)
def test_hostile_yaml_is_refused_in_bounded_time(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError) as error:
        read(path, text)
    assert f"{path}{message}" in str(error.value) and len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_anchors_of_ordinary_size_are_read(tmp_path: Path) -> None:
    config = read(tmp_path / "c.yaml", "data: {sources: [&a {path: x, weight: 1}, {<<: *a, weight: 2}]}")
    assert [source.path for source in config.data.sources] == ["x", "x"]


def test_a_named_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="found a named pipe"):
        load_config(tmp_path / "c.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected YAML"):
        read(tmp_path / "c.yaml", f"out: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists()


def test_flags_override_only_their_fields_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    save_config(FULL, path)
    flags = ["--optim.lr", "1e-3", "--steps", "None", "--no-tensorboard", "--optim.betas", "0.8", "0.9"]
    train = _parse(["train", str(path), *flags, "--data.sources.1.weight=4", "--model.pooling", "mean"])
    expected = dataclasses.replace(
        FULL,
        model=dataclasses.replace(FULL.model, pooling="mean"),
        data=dataclasses.replace(
            FULL.data, sources=(FULL.data.sources[0], dataclasses.replace(FULL.data.sources[1], weight=4.0))
        ),
        optim=dataclasses.replace(FULL.optim, lr=1e-3, betas=(0.8, 0.9)),
        steps=None,
        tensorboard=False,
    )
    assert train.config == expected
    assert _parse(["train", str(path)]).config == FULL
    assert _parse(["train"]).config == TrainConfig()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--offload-embeddings --compile", (True, True, True)),
        ("--offload-embeddings true --compile FALSE", (True, False, True)),
        ("--offload_embeddings=True --no-compile", (True, False, True)),
        ("--no-offload-embeddings --model.shared false", (False, False, False)),
        ("--model.no-shared", (False, False, False)),
        ("--no-model.shared", (False, False, False)),
        ("--model.shared True", (False, False, True)),
    ],
)
def test_boolean_flags_accept_common_notations(words: str, expected: tuple[bool, bool, bool]) -> None:
    config = _parse(["train", *words.split(), "--model.name", "true"]).config
    assert (config.offload_embeddings, config.compile, config.model.shared) == expected
    assert config.model.name == "true"


@pytest.mark.parametrize(
    "words", ["--optim.max-grad-norm none --steps=none", "--optim.max_grad_norm=NULL --steps None"]
)
def test_none_is_accepted_for_optional_numbers(words: str, tmp_path: Path) -> None:
    (path := tmp_path / "c.yaml").write_text("steps: 3\nmodel: {name: none}\noptim: {max_grad_norm: none}")
    assert load_config(path).optim.max_grad_norm is None and load_config(path).model.name == "none"
    config = _parse(["train", str(path), *words.split(), "--model.tokenizer", "none"]).config
    assert (config.steps, config.optim.max_grad_norm, config.model.tokenizer) == (None, None, "none")


def test_the_file_may_follow_a_boolean_flag(tmp_path: Path) -> None:
    save_config(TrainConfig(steps=7), path := tmp_path / "c.yaml")
    config = _parse(["train", "--compile", str(path)]).config
    assert config.compile and config.steps == 7


@pytest.mark.parametrize("words", ["--compile yes", "--compile=1", "--compile=", "--model.no-shared maybe"])
def test_invalid_boolean_values_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words.split()[0].partition('=')[0]}: expected true or false, found"):
        _parse(["train", *words.split()])


def test_help_shows_defaults_of_the_dataclasses_and_of_the_file(tmp_path: Path) -> None:
    text = " ".join(command("train", "--help").out.replace("│", " ").split())
    for flag, default in _flags(TrainConfig()):
        # Up to the first default after this flag.
        entry = re.split(rf" {re.escape(flag)},? ", text, maxsplit=1)[1]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "''" if default == "" else default
        assert entry[entry.index("(default: ") :].startswith(f"(default: {shown})"), flag
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"batch_size": 12345}))
    assert "(default: 12345)" in " ".join(command("train", path, "--help").out.replace("│", " ").split())


def _flags(config: Any, prefix: str = "--") -> list[tuple[str, Any]]:
    """Flag and default of every field with a flag."""
    found: list[tuple[str, Any]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _flags(value, f"{flag}.")
        elif field.name not in ("architecture", "sources", "images"):
            found.append((flag, value))
    return found


def test_patterns_of_files_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = ["a-{000..331}.tar", "a-*.tar.gz", "{0..9}.tgz", "hub/train-*.parquet"]
    others = ["https://host/{000..331}.tar", "s3://bucket/*.parquet", "pipe:cat 0.tar", "owner/name"]
    images = tuple(ImageSource(path) for path in (*local, *others))
    model = ModelConfig(image=ImageConfig("tiny"))
    config = with_absolute_paths(TrainConfig(data=DataConfig(images=images), model=model))
    assert [source.path for source in config.data.images] == [str(tmp_path / path) for path in local] + others


def test_every_field_has_a_docstring() -> None:
    for kind in (TrainConfig, *(t for t in typing.get_type_hints(TrainConfig).values() if dataclasses.is_dataclass(t))):
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Constant):
                assert isinstance(following, ast.Expr), f"{kind.__name__}.{ast.unparse(statement.target)}"
