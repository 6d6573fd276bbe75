"""The reference of the configuration and of the command line, as Markdown made from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from retriever.cli.commands.duplicates import Duplicates
from retriever.cli.commands.encode import Encode
from retriever.cli.commands.evaluation.compare import EvaluateCompare, EvaluateRun
from retriever.cli.commands.evaluation.evaluate import EvaluateBeir
from retriever.cli.commands.evaluation.probe import EvaluateProbe
from retriever.cli.commands.evaluation.zero_shot import EvaluateZeroShot
from retriever.cli.commands.index import IndexBuild, IndexTune
from retriever.cli.commands.index_changes import IndexAdd, IndexDelete, IndexExport, IndexMerge, IndexVerify
from retriever.cli.commands.merge import Merge
from retriever.cli.commands.mine import Mine
from retriever.cli.commands.score import Score
from retriever.cli.commands.search import Search
from retriever.cli.commands.serve import Serve
from retriever.cli.commands.sharing.export import Export
from retriever.cli.commands.sharing.push import Push
from retriever.cli.commands.split import Split
from retriever.cli.commands.study import Study
from retriever.cli.commands.train import Train
from retriever.config.images import ImageSource
from retriever.config.loss_options import SourceLossConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig

COMMANDS: dict[str, type] = {
    "train": Train,
    "split": Split,
    "encode": Encode,
    "index build": IndexBuild,
    "index tune": IndexTune,
    "index merge": IndexMerge,
    "index add": IndexAdd,
    "index delete": IndexDelete,
    "index export": IndexExport,
    "index verify": IndexVerify,
    "search": Search,
    "duplicates": Duplicates,
    "serve": Serve,
    "mine": Mine,
    "push": Push,
    "export": Export,
    "score": Score,
    "merge": Merge,
    "study": Study,
    "evaluate beir": EvaluateBeir,
    "evaluate run": EvaluateRun,
    "evaluate compare": EvaluateCompare,
    "evaluate zero-shot": EvaluateZeroShot,
    "evaluate probe": EvaluateProbe,
}
CONFIGURATION_INTRODUCTION = """\
A training run is described by a YAML file. All fields except `data.sources`, `data.images` and `model.architecture` are
flags, too, and a flag overrides the file: `retriever train run.yaml --optim.lr 1e-4`. In Python, `retriever.train`
takes the same fields as keyword arguments. An unknown key is an error that names the nearest known one. The complete
configuration is written to `config.yaml` in the folder of the run.
"""
COMMAND_INTRODUCTION = """\
Every command has `--help`. The exit code is 0, 1 (failed) or 2 (invalid arguments). Errors are one line on standard
error. `retriever …` and `python -m retriever …` are the same. With `torchrun … -m retriever`, `train`, `encode`,
`index build`, `mine`, `score` and `evaluate beir` share their work between processes; the other commands run in one
process.

Flags without a type are switches, which are off by default.
"""


def configuration_page() -> str:
    """The page of the fields of a run."""
    lines = ["# Configuration", "", CONFIGURATION_INTRODUCTION, "## Run", "", *_fields(TrainConfig, "")]
    for path, section in _sections(TrainConfig, ""):
        lines += [f"## {path}", "", _first_paragraph(section), "", *_fields(section, f"{path}.")]
    for path, source in (("data.sources", SourceConfig), ("data.images", ImageSource)):
        lines += [f"## {path}: entries", "", _first_paragraph(source), "", *_fields(source, "")]
    lines += ["## loss of a source", "", _first_paragraph(SourceLossConfig), "", *_fields(SourceLossConfig, "loss.")]
    return "\n".join(lines)


def command_page() -> str:
    """The page of the commands and their flags."""
    lines = ["# Command line", "", COMMAND_INTRODUCTION]
    for name, command in COMMANDS.items():
        lines += [f"## retriever {name}", "", inspect.cleandoc(command.__doc__ or ""), ""]
        if command is Train:
            lines += ["All fields of the [configuration](configuration.md) are flags, too.", ""]
        lines += _flags(command)
    return "\n".join(lines)


def _sections(config: type, prefix: str) -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hint := hints[field.name]) and isinstance(hint, type):
            yield prefix + field.name, hint
            yield from _sections(hint, f"{prefix}{field.name}.")


def _fields(config: type, prefix: str) -> list[str]:
    hints, helps = typing.get_type_hints(config), _helps(config)
    lines = []
    for field in dataclasses.fields(config):
        if not dataclasses.is_dataclass(hints[field.name]):
            lines += _entry(f"`{prefix}{field.name}`", hints[field.name], field, helps[field.name])
    return lines


def _flags(command: type) -> list[str]:
    hints = typing.get_type_hints(command, include_extras=True)
    helps, lines = _helps(command), []
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or dataclasses.is_dataclass(getattr(hint, "__origin__", None)):
            continue
        positional = any("Positional" in repr(mark) for mark in getattr(hint, "__metadata__", ()))
        name = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        plain = typing.get_type_hints(command)[field.name]
        if plain is bool:
            lines += [f"`{name}`", f":   {' '.join(helps[field.name].split())}", ""]
        else:
            lines += _entry(f"`{name}`", plain, field, helps[field.name])
    return lines


def _entry(name: str, hint: Any, field: dataclasses.Field[Any], text: str) -> list[str]:
    """A term with its type and default, and its explanation."""
    facts = [name, _type_name(hint)]
    if field.default is not dataclasses.MISSING:
        facts.append(f"default {_default(field.default)}")
    elif field.default_factory is dataclasses.MISSING:
        facts.append("required")
    # Outside code, these two would be Markdown.
    text = " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;")
    return [", ".join(facts), f":   {text}", ""]


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(each) for each in arguments)
    if origin is tuple:
        shown = "values" if dataclasses.is_dataclass(arguments[0]) else _type_name(arguments[0])
        return f"list of {shown}" if Ellipsis in arguments else f"{len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "mapping"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", type(None): "none"}
    return names[hint]


def _default(value: object) -> str:
    if value == () or value == "":
        return "empty"
    shown = {None: "none", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return shown[value]
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _first_paragraph(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]


def _helps(cls: type) -> dict[str, str]:
    """The text below each field, of the class and of those that it derives from."""
    helps: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                helps[statement.target.id] = text.value
    return helps
