"""Parsing of requests within limits; invalid requests get a one-line error."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

from starlette.requests import ClientDisconnect, Request

from index.fields.filters import Filter, as_filter
from index.files import InputError, parse_json
from retriever.searching.hybrid import Mode
from retriever.serve.batching import ImageQuery, Query
from retriever.serve.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

PARAMETERS = ("query", "queries", "k", "filter", "mode")
# Seconds within which the body must arrive.
BODY_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    body: int = 2**22
    """Maximum bytes of the body."""
    query: int = 4096
    """Maximum characters per query."""
    queries: int = 64
    """Maximum queries per request."""
    k: int = 100
    """Maximum passages per query."""
    inputs: int = 2048
    """Maximum texts to embed per request."""
    input: int = 32768
    """Maximum characters of a text to embed."""


@dataclass(frozen=True)
class SearchRequest:
    """A parsed request."""

    queries: tuple[Query, ...]
    k: int
    """Passages per query."""
    filter: Filter | None
    """Only passages that match."""
    mode: Mode | None
    """How to rank; None: the service's default."""
    single: bool
    """Whether the request has one query that is not in a list; the answer is then not in a list either."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body of a request.

    Raises:
        RequestError: the body is too long, incomplete, or does not arrive in time.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body:
        raise RequestError(413, f"body: expected at most {limits.body} bytes, found {int(declared)}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise RequestError(413, f"body: expected at most {limits.body} bytes, found more")
    except TimeoutError:
        raise RequestError(408, f"body: expected it within {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise RequestError(400, "body: expected all of it, found a closed connection") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object.

    Raises:
        RequestError: it is not.
    """
    try:
        fields = parse_json(body.decode(), "body")
    except UnicodeDecodeError as error:
        raise RequestError(400, f"body: expected UTF-8, found: {error}") from None
    except InputError as error:
        raise RequestError(400, str(error)) from None
    if not isinstance(fields, dict):
        raise RequestError(422, f"body: expected a JSON object, found {type(fields).__name__}")
    return fields


def parse_json_body(body: bytes, limits: Limits, default_k: int) -> SearchRequest:
    """Parse the body of a POST: {"query": text} or {"queries": [text, …]}, optionally with "k", "filter" and "mode".

    An image as the query, or beside "query", is {"image": the file in base64}.

    Raises:
        RequestError: the body is not JSON of this form, or a limit is exceeded.
    """
    fields = parse_object(body)
    _check_names(fields, (*PARAMETERS, "image"))
    if ("query" in fields or "image" in fields) == ("queries" in fields):
        raise RequestError(422, "body: expected either 'query' or 'queries'")
    single = "queries" not in fields
    queries = [fields.get("query", "")] if single else fields["queries"]
    if not isinstance(queries, list):
        raise RequestError(422, f"queries: expected a list, found {type(queries).__name__}")
    image = _decoded(fields["image"]) if "image" in fields else None
    return search_request(
        queries,
        fields.get("k", default_k),
        limits,
        filter=fields.get("filter"),
        mode=fields.get("mode"),
        image=image,
        single=single,
    )


def parse_parameters(
    parameters: Sequence[tuple[str, str]], limits: Limits, default_k: int, image: Image | None = None
) -> SearchRequest:
    """Parse the parameters of a GET: `query=text`, repeated for several queries, and optionally `k=number`,
    `filter=conditions` and `mode=dense`, `hybrid` or `bm25`. An `image` comes from a form.

    Raises:
        RequestError: the parameters do not have this form, or a limit is exceeded.
    """
    _check_names(dict(parameters), PARAMETERS)
    queries = [value for name, value in parameters if name in ("query", "queries")]
    if not queries:
        raise RequestError(422, "expected a parameter 'query'")
    k: object = default_k
    for name, value in parameters:
        if name == "k":
            # int() would also accept signs, underscores and white space.
            k = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    given = dict(parameters)
    return search_request(
        queries, k, limits, filter=given.get("filter"), mode=given.get("mode"), image=image, single=len(queries) == 1
    )


def search_request(
    queries: Sequence[object],
    k: object,
    limits: Limits,
    *,
    filter: Any = None,
    mode: object = None,
    image: Image | None = None,
    single: bool = True,
) -> SearchRequest:
    """A checked request. An `image` belongs to the only query, whose text may then be empty.

    Raises:
        RequestError: a value is invalid.
    """
    if type(k) is not int or not 1 <= k <= limits.k:
        raise RequestError(422, f"k: expected a whole number from 1 to {limits.k}, found {k!r:.60}")
    if not 1 <= len(queries) <= limits.queries:
        raise RequestError(422, f"queries: expected 1 to {limits.queries} of them, found {len(queries)}")
    if mode is not None and mode not in get_args(Mode):
        raise RequestError(422, f"mode: expected {', '.join(get_args(Mode))}, found {mode!r:.60}")
    try:
        chosen = as_filter(filter)
    except InputError as error:
        raise RequestError(422, str(error)) from None
    texts = [_query(text, limits, empty=image is not None) for text in queries]
    checked: list[Query] = list(texts) if image is None else [ImageQuery(image, text.strip()) for text in texts]
    return SearchRequest(tuple(checked), k, chosen, cast("Mode | None", mode), single)


def image_from(data: bytes) -> Image:
    """Decode an uploaded image.

    Raises:
        RequestError: it is not an image, or is damaged or too large.
    """
    from retriever.models.images.transforms import open_image

    try:
        return open_image(data)
    except InputError as error:
        raise RequestError(422, str(error)) from None


def _decoded(value: object) -> Image:
    if not isinstance(value, str):
        raise RequestError(422, f"image: expected a file in base64, found {type(value).__name__}")
    try:
        # A data URL is accepted as well.
        data = base64.b64decode(value.partition(";base64,")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, f"image: expected a file in base64, found: {error}") from None
    return image_from(data)


def _query(text: Any, limits: Limits, *, empty: bool) -> str:
    if not isinstance(text, str):
        raise RequestError(422, f"query: expected text, found {type(text).__name__}")
    if len(text) > limits.query:
        raise RequestError(422, f"query: expected at most {limits.query} characters, found {len(text)}")
    if not text.strip() and not empty:
        raise RequestError(422, "query: expected text, found none")
    return text


def _check_names(fields: Mapping[str, object], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise RequestError(422, f"expected {', '.join(map(repr, known))}, found {name!r:.60}")
