"""Errors that the command line prints as one line."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from index.files import ArgumentError, ConfigError, InputError

__all__ = [
    "ArgumentError",
    "ConfigError",
    "NotFiniteError",
    "check_at_least",
    "check_choice",
    "check_numbers",
    "check_paths",
    "check_unicode",
    "check_whole",
    "path_list",
]


class NotFiniteError(InputError):
    """Loss or gradients of a training run are no longer finite."""


def check_whole(**arguments: int) -> None:
    """Raise an ArgumentError for the first argument that is not a whole number."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ArgumentError(name, f"expected a whole number, found {_shown(value)}")


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise an ArgumentError for the first argument that is not a whole number, or below `minimum`."""
    check_whole(**arguments)
    for name, value in arguments.items():
        if value < minimum:
            raise ArgumentError(name, f"expected at least {minimum}, found {value}")


def check_choice(choices: tuple[str, ...], **arguments: str) -> None:
    """Raise an ArgumentError for the first argument that is not one of the choices."""
    for name, value in arguments.items():
        if value not in choices:
            raise ArgumentError(name, f"expected one of {', '.join(choices)}, found {value!r:.60}")


def check_numbers(**arguments: float) -> None:
    """Raise an ArgumentError for the first argument that is not a number."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ArgumentError(name, f"expected a number, found {_shown(value)}")


def check_paths(**arguments: Any) -> None:
    """Raise an ArgumentError for the first argument that is not the path of a file or folder, or is empty."""
    for name, value in arguments.items():
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise ArgumentError(name, f"expected a file or folder, found {_shown(value)}")
        if "\0" in str(value):
            raise ArgumentError(name, f"expected a file or folder without NUL characters, found {_shown(str(value))}")


def check_unicode(place: str, text: str) -> None:
    """Raise an InputError for a lone surrogate, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: expected text, found the lone surrogate {text[error.start]!a}") from None


def path_list(name: str, given: Any) -> list[str | Path]:
    """The paths of an argument that may be one path or several.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(given, str | os.PathLike) or not isinstance(given, Iterable):
        given = [given]
    paths = list(given)
    for path in paths:
        check_paths(**{name: path})
    return paths


def _shown(value: object) -> str:
    if value is None or isinstance(value, str | bytes | numbers.Number):
        return f"{value!r:.60}"
    return type(value).__name__
