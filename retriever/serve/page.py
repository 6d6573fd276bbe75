"""The page for people: a form, and the passages found. Made here, without scripts or anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from retriever.searching.search import Answer, Result

STATIC = Path(__file__).resolve().parent / "static"
Images = Callable[[Result], str | None]


def no_image(result: Result) -> str | None:
    """The address of a result's image on this server, for passages that have one; texts have none."""
    return None


@cache
def style() -> str:
    """The style sheet, as it stands in the page."""
    return (STATIC / "page.css").read_text(encoding="utf-8")


@cache
def content_security_policy() -> str:
    """What the page may load: its own style sheet, known by its hash, and images of this server; no scripts."""
    digest = base64.b64encode(hashlib.sha256(style().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )


def render(
    *,
    query: str = "",
    k: int,
    answer: Answer | None = None,
    milliseconds: float = 0.0,
    passages: int,
    problem: str = "",
    most_characters: int,
    images: Images = no_image,
) -> str:
    """The page, with an answer, a problem, or neither. Everything in it is escaped.

    Args:
        query: what the form shows.
        k: passages asked for.
        answer: to `query`.
        milliseconds: that the answer took.
        passages: how many are searched.
        problem: why there is no answer.
        most_characters: that a query may have.
        images: the address of a result's image.
    """
    results = [(result, images(result)) for result in answer.results] if answer else []
    return _template().render(
        style=Markup(style()),
        query=query,
        k=k,
        choices=sorted({5, 10, 20, 50, k}),
        answered=answer is not None,
        results=results,
        milliseconds=milliseconds,
        passages=passages,
        problem=problem,
        most_characters=most_characters,
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(STATIC)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
