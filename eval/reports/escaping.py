"""Escaping text from data in reports and pages: markup is not interpreted, and control characters are replaced."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import BaseLoader, Environment

# Zero-width joiners, of scripts and emoji, are format characters, but harmless.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """Return the text with control characters, which could change a terminal or the text direction, as U+FFFD."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in JOINERS or c in "\n\t" or unicodedata.category(c) == "Zs" else "\ufffd"
        for c in text
    )


def html_environment(loader: BaseLoader) -> Environment:
    """Return a Jinja environment in which every value is escaped and has no control characters."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return Markup(printable(value)) if isinstance(value, Markup) else printable(value)

    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
