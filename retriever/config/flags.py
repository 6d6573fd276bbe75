"""Fields of a configuration that are true or false, and numbers not given, in the forms in which people write flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args, get_type_hints

from retriever.config.run import TrainConfig
from retriever.config.yaml_file import NONE_WORDS
from retriever.errors import ConfigError

VALUES = ("true", "false")


def normalize_flags(words: Sequence[str]) -> list[str]:
    """`--any.field true`, `--any.field=false` and `--no-any.field` as the parser has them: `--any.field` and
    `--any.no-field`; `none` for a number that need not be given as `None`. Other words are left as they are.

    Raises:
        ConfigError: what follows a field that is true or false is neither.
    """
    out: list[str] = []
    left = list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        path = name.removeprefix("--no-").removeprefix("--").split(".")
        off = name.startswith("--no-") or path[-1].startswith("no-")
        path[-1] = path[-1].removeprefix("no-")
        kind = _kind(path) if name.startswith("--") else None
        if kind is bool:
            # The file may stand behind a flag.
            if not equals and left and not left[0].startswith("-") and not left[0].endswith((".yaml", ".yml")):
                equals, value = "=", left.pop(0)
            if equals and value.lower() not in VALUES:
                raise ConfigError(f"{name}: expected true or false, found {value!r:.40}")
            on = off == (value.lower() == "false")
            out.append("--" + ".".join([*path[:-1], path[-1] if on else f"no-{path[-1]}"]))
        elif _need_not_be_given(kind) and (value if equals else "".join(left[:1])).lower() in NONE_WORDS:
            left = left if equals else left[1:]
            out.append(f"{name}=None")
        else:
            out.append(name + equals + value)
    return out


def _kind(path: Sequence[str]) -> object:
    """The type of a field; none for a name that no field has."""
    kind: object = TrainConfig
    for name in path:
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = get_type_hints(kind).get(name.replace("-", "_"))
    return kind


def _need_not_be_given(kind: object) -> bool:
    # A text may be the word itself.
    return type(None) in get_args(kind) and str not in get_args(kind)
