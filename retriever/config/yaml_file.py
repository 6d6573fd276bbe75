"""Read and write the configuration of a training run as YAML, with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from index.files import atomic_path
from retriever.config.dev import split_of_path
from retriever.config.run import TrainConfig
from retriever.config.yaml_loader import read_yaml
from retriever.errors import ConfigError

CONFIG_FILE = "config.yaml"
"""Name of the configuration file in a run folder."""
# Suffixes of files that a source names with braces or wildcards.
SHARDS = (".tar", ".tar.gz", ".tgz", ".parquet")
# Accepted spellings of None for an optional number.
NONE_WORDS = ("none", "null", "auto")


_Config = TypeVar("_Config")


def load_config(path: Path) -> TrainConfig:
    """Read a YAML file into a TrainConfig.

    Raises:
        ConfigError: the file does not exist or is not YAML, a key is unknown (the message suggests the nearest known
            key), or a value has the wrong type.
    """
    tree = read_yaml(path)
    return _build(TrainConfig, {} if tree is None else tree, str(path), "")


def config_from_mapping(tree: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig from a mapping with the keys of the YAML file, checked like the file.

    Raises:
        ConfigError: An unknown key (the nearest known one is named), or a value of the wrong type.
    """
    return _build(TrainConfig, _plain(tree), "config", "")


def with_overrides(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values for some fields.

    Args:
        config: The configuration.
        overrides: Field -> value. The value of a section may be a mapping of some of its fields. A field of a section
            may be given by its own name if only one section has it.

    Raises:
        ConfigError: An unknown or ambiguous field, or a value of the wrong type.
    """
    tree = _with_lists(dataclasses.asdict(config))
    sections = {name: set(value) for name, value in tree.items() if isinstance(value, dict)}
    for name, value in _plain(overrides).items():
        owners = [section for section, fields in sections.items() if name in fields]
        if name in tree or not owners:
            _merge(tree, {name: value})
        elif len(owners) == 1:
            _merge(tree, {owners[0]: {name: value}})
        else:
            fields = " or ".join(f"{section}={{'{name}': ...}}" for section in owners)
            raise ConfigError(f"{name}: expected the field of one section: {fields}")
    return _build(TrainConfig, tree, "config", "")


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _plain(value: Any) -> Any:
    """Mappings, dataclasses, sequences and paths as dicts, lists and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the configuration with absolute local paths, so that a run can be resumed from any working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    def absolute_shards(path: str) -> str:
        # Braces and wildcards do not exist as files. URLs and commands are not paths.
        is_path = "://" not in path and not path.startswith("pipe:")
        return str(Path(path).absolute()) if is_path and path.endswith(SHARDS) else absolute(path)

    def absolute_set(path: str) -> str:
        folder, split = split_of_path(path)
        return f"{absolute(folder)}:{split}" if split else absolute(folder)

    sources = tuple(dataclasses.replace(source, path=absolute(source.path)) for source in config.data.sources)
    images = tuple(dataclasses.replace(source, path=absolute_shards(source.path)) for source in config.data.images)
    teacher = config.loss.teacher
    cache, tokenizer, tower = config.data.cache, config.model.tokenizer, config.model.image
    guide = dataclasses.replace(config.loss.guide, model=absolute(config.loss.guide.model))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            name=absolute(config.model.name),
            tokenizer=tokenizer and absolute(tokenizer),
            image=dataclasses.replace(tower, name=tower.name if tower.is_new else absolute(tower.name)),
        ),
        data=dataclasses.replace(
            config.data,
            sources=sources,
            images=images,
            cache=cache and str(Path(cache).resolve()),
            corpus=absolute(config.data.corpus),
        ),
        loss=dataclasses.replace(
            config.loss,
            guide=guide,
            teacher=dataclasses.replace(
                teacher,
                model=absolute(teacher.model),
                passages=absolute(teacher.passages),
                queries=absolute(teacher.queries),
            ),
        ),
        query_only=absolute(config.query_only),
        dev=dataclasses.replace(
            config.dev, path=absolute(config.dev.path), paths=tuple(map(absolute_set, config.dev.paths))
        ),
    )


def save_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration atomically as YAML. `load_config` reads an equal configuration from it."""
    tree = _with_lists(dataclasses.asdict(config))
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _with_lists(tree: Any) -> Any:
    """Convert tuples to lists, since YAML has no tuples."""
    if isinstance(tree, dict):
        return {key: _with_lists(value) for key, value in tree.items()}
    return [_with_lists(value) for value in tree] if isinstance(tree, tuple | list) else tree


def _build(kind: type[_Config], tree: Any, file: str, where: str) -> _Config:
    """Build the dataclass `kind` from the mapping at the key `where`."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: {where or 'the file'}: expected keys and values, found {_shown(tree)}")
    known = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{file}: {place}: unknown key; {hint}")
        values[key] = _convert(known[key], value, file, place)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        # Raised by __post_init__; the message names the field.
        raise ConfigError(f"{file}: {error}") from None


def _convert(kind: Any, value: Any, file: str, place: str) -> Any:
    """Convert `value` to the type of a field. A float field also accepts integers and '1e-4', which YAML reads as
    text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        if value is None or (inner is not str and isinstance(value, str) and value.lower() in NONE_WORDS):
            return None
        return _convert(inner, value, file, place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, file, place)
    if origin is tuple and isinstance(value, list):
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        if inner is None and len(value) != len(arguments):
            raise ConfigError(f"{file}: {place}: expected {len(arguments)} values, found {len(value)}")
        kinds = [inner] * len(value) if inner is not None else list(arguments)
        return tuple(_convert(k, v, file, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{file}: {place}: expected one of {', '.join(map(str, arguments))}, found {_shown(value)}")
    if origin is dict and isinstance(value, dict):
        _check_json(value, file, place)
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if isinstance(value, str) and "\0" in value:
            # No name of a file can contain it.
            raise ConfigError(f"{file}: {place}: expected text without NUL characters, found {_shown(value)}")
        return value
    expected = "a list" if origin is tuple else getattr(origin or kind, "__name__", kind)
    raise ConfigError(f"{file}: {place}: expected {expected}, found {_shown(value)}")


def _check_json(value: Any, file: str, place: str) -> None:
    """Refuse values that JSON does not have: keys that are not text, dates, bytes and sets."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{file}: {place}: expected text as key, found {_shown(key)}")
            _check_json(item, file, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_json(item, file, f"{place}[{number}]")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise ConfigError(f"{file}: {place}: expected text, a number, a list or keys and values, found {_shown(value)}")


def _shown(value: Any) -> str:
    # Python does not write integers of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.40} ({type(value).__name__})"
