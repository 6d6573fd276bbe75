"""The HTTP service: /search and embeddings for programs, / for people, /healthz and /metrics for monitoring."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from index.ann.multi_index import MultiIndex
from retriever.searching.hybrid import Mode
from retriever.searching.search import Answer
from retriever.serve import page
from retriever.serve.batching import Engine, ImageQuery, text_of
from retriever.serve.embeddings import EmbeddingRoutes
from retriever.serve.errors import JSON, RequestError, error_response
from retriever.serve.guard import AUTHORIZED, Guard
from retriever.serve.metrics import Metrics
from retriever.serve.requests import Limits, SearchRequest, image_from, parse_json_body, parse_parameters, read_body
from retriever.serve.thumbnails import Thumbnails
from retriever.serve.waiting import engine_result

if TYPE_CHECKING:
    from PIL.Image import Image

    from retriever.serve.changes import Changes

DEFAULT_K = 10
# Seconds that a client may take to read a part of a response.
SEND_SECONDS = 30.0
METHODS = ("GET", "HEAD", "POST", "DELETE")
# Sent with every response: no content type sniffing, no referrer to other sites, no caching.
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Service:
    """The handlers of the routes.

    Args:
        engine: answers the queries.
        limits: limits of a request.
        log: called with each line of the log.
        image_url: returns the URL of a result's image on this server, or None.
        name: name of the model.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        log: Callable[[str], None],
        image_url: page.ImageUrl = page.no_image,
        name: str = "model",
    ) -> None:
        self._name = name
        self._embeds_images = engine.towers.embeds_images
        self._default_mode: Mode = "dense" if engine.hybrid is None else "hybrid"
        self._engine = engine
        self._image_url = image_url
        self._limits = limits
        self._log = log
        self._default_k = min(DEFAULT_K, limits.k)

    async def search(self, request: Request) -> Response:
        """Handle GET /search?query=…&k=…, and POST /search with "query", "image" or "queries"."""
        started = time.perf_counter()
        if request.method == "POST":
            body = await read_body(request, self._limits)
            # An image is decoded in a thread: others must not wait for it.
            wanted = await asyncio.to_thread(parse_json_body, body, self._limits, self._default_k)
        else:
            wanted = parse_parameters(request.query_params.multi_items(), self._limits, self._default_k)
        answers = [_as_dict(answer) for answer in await self._answers(wanted)]
        content = answers[0] if wanted.single else {"answers": answers}
        return JSON({**content, "milliseconds": _milliseconds(started)})

    async def show(self, request: Request) -> Response:
        """Handle GET /?q=…&k=…, the search page, and POST / of its form with an image."""
        started, status = time.perf_counter(), 200
        fields, image = await self._form(request) if request.method == "POST" else (dict(request.query_params), None)
        query = fields.pop("q", "")
        context: dict[str, Any] = {"k": self._default_k, "mode": self._default_mode}
        if query.strip() or image is not None:
            try:
                parameters = [("query", query), *((n, v) for n, v in fields.items() if n in ("k", "filter", "mode"))]
                wanted = parse_parameters(parameters, self._limits, self._default_k, image)
                [answer] = await self._answers(wanted)
                context = {"k": wanted.k, "answer": answer, "milliseconds": _milliseconds(started)}
                context["mode"] = wanted.mode or self._default_mode
            except RequestError as error:
                context["problem"], status = str(error), error.status
        index = self._engine.index
        columns = [each.columns for each in (index.indexes if isinstance(index, MultiIndex) else [index])]
        text = page.render(
            query=query[: self._limits.query],
            passages=index.rows,
            max_characters=self._limits.query,
            image_url=self._image_url,
            filter=fields.get("filter", "")[: self._limits.query],
            kinds=columns[0].kinds if columns[0] is not None else {},
            modes=get_args(Mode) if self._engine.hybrid is not None else (),
            images_asked=self._embeds_images,
            facts={"model": self._name, "dimensions": index.dim, "index": index.factory},
            **context,
        )
        return HTMLResponse(text, status, {"content-security-policy": page.content_security_policy()})

    async def _form(self, request: Request) -> tuple[dict[str, str], Image | None]:
        """The texts and the image of a form.

        Raises:
            RequestError: it is too long or no form, or the image is damaged.
        """
        body = await read_body(request, self._limits)
        try:
            form = await Request({**request.scope}, _receiving(body)).form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise RequestError(422, f"form: {error.detail}") from None
        texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        files = [value for value in form.values() if isinstance(value, UploadFile) and value.size]
        if files and not self._embeds_images:
            raise RequestError(422, "image: expected text, because the model does not embed images")
        return texts, await asyncio.to_thread(image_from, await files[0].read()) if files else None

    async def health(self, request: Request) -> Response:
        """Handle GET /healthz and /health: status 200 while queries are answered, otherwise 503."""
        index, alive = self._engine.index, self._engine.alive
        state: dict[str, Any] = {"status": "ok" if alive else "closed"}
        if getattr(request.state, AUTHORIZED, True):
            state |= {"passages": index.rows, "dim": index.dim, "factory": index.factory}
            state["waiting"] = self._engine.waiting
        return JSON(state, 200 if alive else 503)

    async def _answers(self, wanted: SearchRequest) -> list[Answer]:
        mode = wanted.mode or self._default_mode
        if any(isinstance(query, ImageQuery) for query in wanted.queries):
            if not self._embeds_images:
                raise RequestError(422, "image: expected text, because the model does not embed images", "image")
            if wanted.mode is None and not all(map(text_of, wanted.queries)):
                mode = "dense"
        if mode != "dense" and self._engine.hybrid is None:
            raise RequestError(422, f"mode: expected dense, found {mode}; `retriever serve --hybrid` has it", "mode")
        if mode != "dense" and not all(map(text_of, wanted.queries)):
            raise RequestError(422, f"mode: expected dense for an image without a text, found {mode}", "mode")
        return await engine_result(self._engine.submit, wanted.queries, wanted.k, wanted.filter, mode)


def _receiving(body: bytes) -> Receive:
    """A `receive` that gives a body that was read before."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


class AccessLog:
    """Middleware that logs and counts each request, without the query, and adds HEADERS to each response.

    A line has the time, client address, method, path, status, bytes and milliseconds. A client that does not read its
    response is disconnected after SEND_SECONDS.
    """

    def __init__(self, app: ASGIApp, log: Callable[[str], None], metrics: Metrics, routes: Sequence[str]) -> None:
        self._app = app
        self._log = log
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size = time.perf_counter(), 0, 0

        async def send_and_count(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            else:
                size += len(message.get("body", b""))
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            await self._app(scope, receive, send_and_count)
        except Exception as error:  # noqa: BLE001 - logged, and answered with status 500
            # A batch that fails, for example for lack of memory, must not stop the service.
            self._log(f"search failed: {type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            # Not decoded: a decoded path could contain line breaks.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            # Other paths are counted together: clients could ask for any number of them.
            route = scope["path"] if scope["path"] in self._routes else "other"
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.request(route, method, status, time.perf_counter() - started)
            self._log(f"{now} {client} {scope['method']} {path} {status} {size} bytes {_milliseconds(started):.1f} ms")


def make_app(
    engine: Engine,
    limits: Limits,
    log: Callable[[str], None],
    thumbnails: Thumbnails | None = None,
    *,
    name: str = "model",
    metrics: Metrics | None = None,
    names: frozenset[str] | None = None,
    token: str | None = None,
    changes: Changes | None = None,
) -> ASGIApp:
    """Create the ASGI application.

    Args:
        engine: answers the queries.
        limits: limits of a request.
        log: called with each line of the log.
        thumbnails: images that the page shows. Default: None, the page shows texts only.
        name: name of the model in /v1/embeddings and /info.
        metrics: the counters of /metrics. Default: None, new ones.
        names: names that a Host header may state. Default: None, any.
        token: the token that requests must have. Default: None, none.
        changes: the handlers of /add and /delete. Default: None, the index cannot be changed by requests.
    """
    metrics = metrics or Metrics()
    metrics.watch("waiting_queries", lambda: engine.waiting)
    metrics.watch("passages", lambda: engine.index.rows)
    service = Service(engine, limits, log, page.no_image if thumbnails is None else thumbnails.url, name)
    embeddings = EmbeddingRoutes(engine, name, limits)

    async def post_to_root(request: Request) -> Response:
        # Clients of Text Embeddings Inference that are given only the address of the service ask here, too.
        form = request.headers.get("content-type", "").startswith("multipart/form-data")
        return await (service.show(request) if form else embeddings.tei(request))

    async def show_metrics(request: Request) -> Response:
        return metrics.response()

    routes = [
        Route("/", service.show, methods=["GET"]),
        Route("/", post_to_root, methods=["POST"]),
        Route("/search", service.search, methods=["GET", "POST"]),
        Route("/embed", embeddings.tei, methods=["POST"]),
        Route("/info", embeddings.info, methods=["GET"]),
        Route("/v1/embeddings", embeddings.openai, methods=["POST"]),
        Route("/v1/models", embeddings.models, methods=["GET"]),
        Route("/healthz", service.health, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]
    if thumbnails is not None:
        routes.append(Route("/image", thumbnails.show, methods=["GET"]))
    if changes is not None:
        routes += [Route("/add", changes.add, methods=["POST"]), Route("/delete", changes.delete, methods=["POST"])]
    app = Starlette(
        routes=routes,
        exception_handlers={RequestError: _request_error, HTTPException: _http_error, Exception: _failure},
    )
    return AccessLog(Guard(app, names, token), log, metrics, [route.path for route in routes])


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry-after": "1"} if error.status == 429 else None
    return error_response(request.url.path, error.status, str(error), headers, error.param)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(request.url.path, error.status_code, error.detail, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    # The middleware logs the reason; it may name files.
    return error_response(request.url.path, 500, "the search failed; see the service's log")


def _as_dict(answer: Answer) -> dict[str, Any]:
    return {"query": answer.query, "results": [dataclasses.asdict(result) for result in answer.results]}


def _milliseconds(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 3)
