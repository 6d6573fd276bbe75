"""The HTTP service: /search for programs, / for people, /healthz for whoever watches over it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever.searching.search import Answer
from retriever.serve import page
from retriever.serve.batching import Busy, Closed, Engine
from retriever.serve.requests import Limits, Refused, Wanted, from_address, from_json, read_body
from retriever.serve.thumbnails import Pictures

DEFAULT_K = 10
# What every answer says: show nothing as another type than it is, tell no other site what was asked.
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class JSON(Response):
    """A value as JSON on one line."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()


class Service:
    """The routes, around the engine that answers."""

    def __init__(
        self, engine: Engine, limits: Limits, line: Callable[[str], None], images: page.Images = page.no_image
    ) -> None:
        self._engine = engine
        self._images = images
        self._limits = limits
        self._line = line
        self._default_k = min(DEFAULT_K, limits.k)

    async def search(self, request: Request) -> Response:
        """GET /search?query=…&k=…, or POST {"query" or "queries", "k"}."""
        started = time.perf_counter()
        if request.method == "POST":
            wanted = from_json(await read_body(request, self._limits), self._limits, self._default_k)
        else:
            wanted = from_address(request.query_params.multi_items(), self._limits, self._default_k)
        answers = [_as_dict(answer) for answer in await self._answers(wanted)]
        content = answers[0] if wanted.single else {"answers": answers}
        return JSON({**content, "milliseconds": _milliseconds(started)})

    async def show(self, request: Request) -> Response:
        """GET /?q=…&k=…: the page."""
        started = time.perf_counter()
        query, status = request.query_params.get("q", ""), 200
        shown: dict[str, Any] = {"k": self._default_k}
        if query.strip():
            parameters = [("query", query), *[("k", k) for k in request.query_params.getlist("k")]]
            try:
                wanted = from_address(parameters, self._limits, self._default_k)
                [answer] = await self._answers(wanted)
                shown = {"k": wanted.k, "answer": answer, "milliseconds": _milliseconds(started)}
            except Refused as refused:
                shown["problem"], status = str(refused), refused.status
        text = page.render(
            query=query[: self._limits.query],
            passages=self._engine.index.rows,
            most_characters=self._limits.query,
            images=self._images,
            **shown,
        )
        return HTMLResponse(text, status, {"content-security-policy": page.content_security_policy()})

    async def health(self, request: Request) -> Response:
        """GET /healthz: 200 while queries are answered, else 503."""
        index, alive = self._engine.index, self._engine.alive
        about = {"passages": index.rows, "dim": index.dim, "factory": index.factory, "waiting": self._engine.waiting}
        return JSON({"status": "ok" if alive else "closed", **about}, 200 if alive else 503)

    async def _answers(self, wanted: Wanted) -> list[Answer]:
        try:
            return await asyncio.wrap_future(self._engine.submit(wanted.queries, wanted.k))
        except Busy:
            raise Refused(429, "too many queries are waiting; ask again in a second") from None
        except Closed:
            raise Refused(503, "the service is ending") from None
        except Exception as error:  # noqa: BLE001 - it goes to the log
            # One batch that failed, for want of memory or of a readable disk, must not end the service.
            self._line(f"search failed: {type(error).__name__}: {' '.join(str(error).split())}")
            raise Refused(500, "the search failed; the service's log says why") from None


class AccessLog:
    """One line a request: who, what, status, bytes, milliseconds. What was asked is not written down."""

    def __init__(self, app: ASGIApp, line: Callable[[str], None]) -> None:
        self._app = app
        self._line = line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size = time.perf_counter(), 0, 0

        async def noting(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            # As it came, percent signs and all: what is decoded could hold a line of its own.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            what = f"{scope['method']} {path}"
            self._line(f"{now} {client} {what} {status} {size} bytes {_milliseconds(started):.1f} ms")


def make_app(engine: Engine, limits: Limits, line: Callable[[str], None], pictures: Pictures | None = None) -> ASGIApp:
    """The service as an ASGI application; `line` takes its log, and the page shows `pictures` where it has them."""
    service = Service(engine, limits, line, page.no_image if pictures is None else pictures.address)
    routes = [
        Route("/", service.show, methods=["GET"]),
        Route("/search", service.search, methods=["GET", "POST"]),
        Route("/healthz", service.health, methods=["GET"]),
    ]
    if pictures is not None:
        routes.append(Route("/picture", pictures.show, methods=["GET"]))
    app = Starlette(
        routes=routes,
        exception_handlers={Refused: _refused, HTTPException: _http_error},
    )
    return AccessLog(app, line)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSON({"error": str(error)}, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSON({"error": error.detail}, error.status_code, dict(error.headers or {}))


def _as_dict(answer: Answer) -> dict[str, Any]:
    return {"query": answer.query, "results": [dataclasses.asdict(result) for result in answer.results]}


def _milliseconds(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 3)
