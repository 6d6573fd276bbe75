"""The search page: a form and the results, without scripts or external resources."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType

from jinja2 import FileSystemLoader, Template
from markupsafe import Markup

from eval.reports.escaping import html_environment
from retriever.searching.search import Answer, Result
from retriever.serve.excerpts import marked_excerpt

STATIC = Path(__file__).resolve().parent / "static"
MODES = {"dense": "meaning", "hybrid": "meaning and words", "bm25": "words"}
"""Ways of ranking, as the page names them."""
ImageUrl = Callable[[Result], str | None]
"""Returns the URL of a result's image on this server, or None if the passage is a text."""


def no_image(result: Result) -> str | None:
    """The ImageUrl of an index of texts."""
    return None


@cache
def style() -> str:
    """The style sheet of the page."""
    return (STATIC / "page.css").read_text(encoding="utf-8")


@cache
def content_security_policy() -> str:
    """The Content-Security-Policy header: the page's style sheet (by its hash), images of this server, no scripts."""
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
    max_characters: int,
    image_url: ImageUrl = no_image,
    filter: str = "",
    kinds: Mapping[str, str] = MappingProxyType({}),
    modes: Sequence[str] = (),
    mode: str = "dense",
    images_asked: bool = False,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Render the page with an answer, a problem, or neither. All text is escaped.

    Args:
        query: the text in the form.
        k: number of passages to show.
        answer: the answer to `query`, if any.
        milliseconds: time that the answer took.
        passages: number of indexed passages.
        problem: why there is no answer.
        max_characters: maximum length of a query.
        image_url: returns the URL of a result's image.
        filter: the filter in the form.
        kinds: name -> type of each field that can be filtered by.
        modes: ways of ranking to choose from.
        mode: the chosen one.
        images_asked: whether an image may be the query.
        facts: name -> value of what the page says of the model and the index.
    """
    results = []
    for result in answer.results if answer else []:
        pieces = marked_excerpt(result.text, query)
        whole = sum(len(piece) for piece, _ in pieces) < len(result.text)
        results.append((result, image_url(result), pieces, whole))
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
        max_characters=max_characters,
        filter=filter,
        kinds=kinds,
        modes=[(name, MODES[name]) for name in modes],
        mode=mode,
        score_title="inner product of query and passage" if mode == "dense" else f"score of {MODES[mode]}",
        images_asked=images_asked,
        facts=facts,
    )


@cache
def _template() -> Template:
    return html_environment(FileSystemLoader(STATIC)).get_template("page.html")
