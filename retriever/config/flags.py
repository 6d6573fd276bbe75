"""Command line flags for boolean and optional fields of the configuration, in the spellings that people use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar, get_args, get_type_hints

from retriever.config.images import ImageSource
from retriever.config.loss_options import LimitConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.config.yaml_file import NONE_WORDS
from retriever.errors import ConfigError

Source = TypeVar("Source", SourceConfig, ImageSource)
BOOLEANS = ("true", "false")
# A switch that is chosen automatically unless it is given.
AUTOMATIC = (*BOOLEANS, "auto", "none")


def normalize_flags(words: Sequence[str]) -> list[str]:
    """Rewrite flags to the spellings that the parser accepts.

    `--any.field true`, `--any.field=false` and `--no-any.field` become `--any.field` and `--any.no-field`. `none` as
    the value of an optional number becomes `None`. Other words are unchanged.

    Raises:
        ConfigError: the value of a boolean field is neither true nor false.
    """
    normalized: list[str] = []
    remaining = list(words)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        path = name.removeprefix("--no-").removeprefix("--").split(".")
        negated = name.startswith("--no-") or path[-1].startswith("no-")
        path[-1] = path[-1].removeprefix("no-")
        kind = _field_type(path) if name.startswith("--") else None
        if kind == bool | None:
            value, remaining = _switch_value(value if equals else None, remaining)
            if value.lower() not in AUTOMATIC:
                raise ConfigError(f"{name}: expected true, false or auto, found {value!r:.40}")
            automatic = value.lower() in ("auto", "none")
            chosen = "None" if automatic else str(negated == (value.lower() == "false"))
            normalized.append("--" + ".".join(path) + f"={chosen}")
        elif kind is bool:
            value, remaining = _switch_value(value if equals else None, remaining)
            if value.lower() not in BOOLEANS:
                raise ConfigError(f"{name}: expected true or false, found {value!r:.40}")
            on = negated == (value.lower() == "false")
            normalized.append("--" + ".".join([*path[:-1], path[-1] if on else f"no-{path[-1]}"]))
        elif _is_optional(kind) and (value if equals else "".join(remaining[:1])).lower() in NONE_WORDS:
            remaining = remaining if equals else remaining[1:]
            normalized.append(f"{name}=None")
        else:
            normalized.append(name + equals + value)
    return normalized


def with_limits_of_flags(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """The defaults of the flags, with a limit for each source that a flag `--data.sources.N.loss.limit.…` names.

    A source without a limit of its own has no such flags otherwise.
    """
    named = {
        (match[1], int(match[2]))
        for word in words
        if (match := re.match(r"--data\.(sources|images)\.(\d+)\.loss\.limit\.", word))
    }
    if not named:
        return config

    def limited(kind: str, listed: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(
            dataclasses.replace(source, loss=dataclasses.replace(source.loss, limit=LimitConfig()))
            if (kind, number) in named and source.loss.limit is None
            else source
            for number, source in enumerate(listed)
        )

    sources, images = limited("sources", config.data.sources), limited("images", config.data.images)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, images=images))


def _switch_value(value: str | None, remaining: list[str]) -> tuple[str, list[str]]:
    """The value of a switch, true if none follows, and the words after it."""
    if value is not None:
        return value, remaining
    # The word after the flag may be the configuration file.
    if remaining and not remaining[0].startswith("-") and not remaining[0].endswith((".yaml", ".yml")):
        return remaining[0], remaining[1:]
    return "true", remaining


def _field_type(path: Sequence[str]) -> object:
    """The type of a field, or None for an unknown name."""
    kind: object = TrainConfig
    for name in path:
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = get_type_hints(kind).get(name.replace("-", "_"))
    return kind


def _is_optional(kind: object) -> bool:
    # "none" is a valid value of a text field.
    return type(None) in get_args(kind) and str not in get_args(kind)
