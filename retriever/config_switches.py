"""Fields of a configuration that are true or false, in the forms in which people write them as flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_type_hints

from retriever.config import ConfigError, TrainConfig

VALUES = ("true", "false")


def as_switches(words: Sequence[str]) -> list[str]:
    """`--any.field true`, `--any.field=false` and `--no-any.field` as the parser has them: `--any.field` and
    `--any.no-field`. Other words are left as they are.

    Raises:
        ConfigError: what follows such a flag is neither true nor false.
    """
    out: list[str] = []
    left = list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        path = name.removeprefix("--no-").removeprefix("--").split(".")
        off = name.startswith("--no-") or path[-1].startswith("no-")
        path[-1] = path[-1].removeprefix("no-")
        if not name.startswith("--") or not _is_switch(path):
            out.append(name + equals + value)
            continue
        # The file may stand behind a flag.
        if not equals and left and not left[0].startswith("-") and not left[0].endswith((".yaml", ".yml")):
            equals, value = "=", left.pop(0)
        if equals and value.lower() not in VALUES:
            raise ConfigError(f"{name}: expected true or false, found {value!r:.40}")
        on = off == (value.lower() == "false")
        out.append("--" + ".".join([*path[:-1], path[-1] if on else f"no-{path[-1]}"]))
    return out


def _is_switch(path: Sequence[str]) -> bool:
    kind: object = TrainConfig
    for name in path:
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return False
        kind = get_type_hints(kind).get(name.replace("-", "_"))
    return kind is bool
