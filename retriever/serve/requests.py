"""What a request may ask: read within limits, and refused in one line otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from index.files import InputError, parse_json

BODY_SECONDS = 10.0


class Refused(Exception):
    """A request that is not answered: the HTTP status, and why in one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may ask."""

    body: int = 2**18
    """Bytes of a request's body."""
    query: int = 4096
    """Characters of a query."""
    queries: int = 64
    """Queries of a request."""
    k: int = 100
    """Passages a query."""


@dataclass(frozen=True)
class Wanted:
    """What is searched for: one query, or a list of them that gets a list of answers."""

    queries: tuple[str, ...]
    k: int
    single: bool


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Refused: it is too long, or takes too long to come.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body:
        raise Refused(413, f"body: expected at most {limits.body} bytes, found {int(declared)}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise Refused(413, f"body: expected at most {limits.body} bytes, found more")
    except TimeoutError:
        raise Refused(408, f"body: expected it within {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "body: expected all of it, found a closed connection") from None
    return bytes(body)


def from_json(body: bytes, limits: Limits, default_k: int) -> Wanted:
    """What a POST asks: {"query": text} or {"queries": [text, …]}, and "k" if it likes.

    Raises:
        Refused: it is not that.
    """
    try:
        fields = parse_json(body.decode(), "body")
    except UnicodeDecodeError as error:
        raise Refused(400, f"body: expected UTF-8, found: {error}") from None
    except InputError as error:
        raise Refused(400, str(error)) from None
    if not isinstance(fields, dict):
        raise Refused(422, f"body: expected a JSON object, found {type(fields).__name__}")
    _refuse_others(fields)
    if ("query" in fields) == ("queries" in fields):
        raise Refused(422, "body: expected either 'query' or 'queries'")
    queries = [fields["query"]] if "query" in fields else fields["queries"]
    if not isinstance(queries, list):
        raise Refused(422, f"queries: expected a list, found {type(queries).__name__}")
    return _wanted(queries, fields.get("k", default_k), limits, "query" in fields)


def from_address(parameters: Sequence[tuple[str, str]], limits: Limits, default_k: int) -> Wanted:
    """What a GET asks: `query=text`, several times for several queries, and `k=number` if it likes.

    Raises:
        Refused: it is not that.
    """
    _refuse_others(dict(parameters))
    queries = [value for name, value in parameters if name in ("query", "queries")]
    if not queries:
        raise Refused(422, "expected a parameter 'query'")
    k: object = default_k
    for name, value in parameters:
        if name == "k":
            # Digits alone: int() would take much else for a number.
            k = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    return _wanted(queries, k, limits, len(queries) == 1)


def _wanted(queries: Sequence[object], k: object, limits: Limits, single: bool) -> Wanted:
    if type(k) is not int or not 1 <= k <= limits.k:
        raise Refused(422, f"k: expected a whole number from 1 to {limits.k}, found {k!r:.60}")
    if not 1 <= len(queries) <= limits.queries:
        raise Refused(422, f"queries: expected 1 to {limits.queries} of them, found {len(queries)}")
    return Wanted(tuple(_query(text, limits) for text in queries), k, single)


def _query(text: Any, limits: Limits) -> str:
    if not isinstance(text, str):
        raise Refused(422, f"query: expected text, found {type(text).__name__}")
    if len(text) > limits.query:
        raise Refused(422, f"query: expected at most {limits.query} characters, found {len(text)}")
    if not text.strip():
        raise Refused(422, "query: expected text, found none")
    return text


def _refuse_others(fields: Mapping[str, object]) -> None:
    for name in fields:
        if name not in ("query", "queries", "k"):
            raise Refused(422, f"expected 'query', 'queries' and 'k', found {name!r:.60}")
