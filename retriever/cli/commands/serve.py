"""`retriever serve`."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import UseAppendAction

from index.files import InputError
from index.progress import Reporter, SilentReporter
from retriever.cli.commands.common import IndexDevice, Switch, TruncatedEmbedding
from retriever.errors import ArgumentError, check_at_least

if TYPE_CHECKING:
    from index.ann.index import Index
    from index.ann.multi_index import MultiIndex
    from retriever.searching.hybrid import HybridIndex


@dataclass(frozen=True, kw_only=True)
class Serve(IndexDevice, TruncatedEmbedding):
    """Answer queries over HTTP: JSON at /search, a page at /, embeddings at /v1/embeddings and /embed, and /metrics.

    Ctrl-C or SIGTERM stops the service after the requests that it has accepted.
    """

    index: UseAppendAction[tuple[Path, ...]]
    """Folder of `retriever index build`. May be repeated: the indexes are searched as one."""
    mmap: Switch = False
    """Memory-map the index instead of loading it, for indexes larger than memory."""
    verify: Switch = False
    """Check the sha256 of every file of the index first, which reads all of it. By default, index.faiss (with --mmap
    only up to 256 MiB) and lists on disk of up to 256 MiB are checked, and of other files the parts that are read."""
    hybrid: Switch = False
    """Rank by embeddings and BM25 together, unless a request has another "mode". BM25 (extra bm25) is built in memory
    at the start and after each change of the index."""
    fusion: Literal["rrf", "minmax", "zscore"] = "rrf"
    """How --hybrid fuses the two rankings: by reciprocal ranks, or by normalized scores."""
    dense_weight: float = 0.5
    """Weight of the embeddings in --hybrid, 0 to 1; BM25 has the rest."""
    bm25_stopwords: str = "en"
    """Language of BM25's stop words in --hybrid; none: no stop words are removed."""
    reload_seconds: float = 2.0
    """Seconds between checks whether the index has changed (index add, delete …). A changed index is opened while
    queries are answered from the old one. 0: never checked."""
    allow_changes: Switch = False
    """Accept POST /add and POST /delete, which change the index on disk. They need --token-file or --token, or
    --without-token."""
    images: str | None = None
    """The images that were indexed, as `retriever encode --data` read them: a folder, tars or a table; or the folder
    of a table of paths. The page then shows the images of the results."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 accepts requests from other machines; these need --token or --token-file."""
    port: int = 8000
    """Port to listen on. 0: any free port."""
    token: str | None = None
    """Token that requests must have: `Authorization: Bearer TOKEN`, or as the password in a browser. Other users of
    this machine can read it in the list of processes; --token-file hides it."""
    token_file: Path | None = None
    """File whose first line is the token, instead of --token."""
    without_token: Switch = False
    """Accept requests from other machines without a token, for example behind a proxy that authenticates users."""
    allowed_host: UseAppendAction[tuple[str, ...]] = ()
    """Name that the Host header of requests may have, besides localhost and --host, for example behind a proxy. May be
    repeated."""
    model_name: str | None = None
    """Name of the model in /v1/embeddings and /info. None: --model."""
    max_k: int = 100
    """Maximum number of results per query."""
    max_queries: int = 64
    """Maximum number of queries per request."""
    max_query_chars: int = 4096
    """Maximum number of characters per query."""
    max_inputs: int = 2048
    """Maximum number of texts to embed, or of passages to add, per request."""
    max_input_chars: int = 32768
    """Maximum number of characters per text to embed."""
    max_body_bytes: int = 4194304
    """Maximum number of bytes per request."""
    max_waiting: int = 512
    """Maximum number of queries that wait for an answer. Further ones are refused with status 429."""
    max_connections: int = 1024
    """Maximum number of connections. If another one opens, the connection that has waited longest for a request is
    closed."""
    max_connections_per_client: int = 256
    """Maximum number of connections from one address. If another one opens, the connection from this address that has
    waited longest for a request is closed."""
    header_seconds: float = 10.0
    """Seconds within which the headers of a request must arrive."""
    idle_seconds: float = 15.0
    """Seconds after which a connection without a request is closed."""
    stop_seconds: float = 30.0
    """Maximum number of seconds for answering accepted requests when the service is stopped."""
    batch: int = 32
    """Maximum number of queries per batch of the model. 1: no batching."""
    batch_ms: float = 3.0
    """Milliseconds that a query waits for other queries, which are then encoded in the same batch."""

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError("--index: expected at least one folder, found none")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port: expected a number from 0 to 65535, found {self.port}")
        if not 0 <= self.batch_ms <= 1000:
            raise ValueError(f"--batch-ms: expected a number from 0 to 1000, found {self.batch_ms}")
        if not 0 <= self.dense_weight <= 1:
            raise ValueError(f"--dense-weight: expected a number from 0 to 1, found {self.dense_weight}")
        if not 0 <= self.reload_seconds <= 86400:
            raise ValueError(f"--reload-seconds: expected a number from 0 to 86400, found {self.reload_seconds}")
        for name in ("header_seconds", "idle_seconds", "stop_seconds"):
            if not 0 < (value := getattr(self, name)) <= 3600:
                raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, at most 3600, found {value}")
        if self.token is not None and self.token_file is not None:
            raise ValueError("--token: expected a token or a file of it (--token-file), found both")
        if self.token is not None and not self.token.strip():
            raise ValueError("--token: expected text, found none")
        if self.allow_changes:
            if self.token is None and self.token_file is None and not self.without_token:
                raise ValueError("--allow-changes: expected --token-file or --token, or --without-token, found none")
            if len(self.index) > 1:
                raise ValueError(f"--allow-changes: expected one --index, found {len(self.index)}")
            if self.mmap:
                raise ValueError("--allow-changes: expected no --mmap: a changed index is written from memory")

    def run(self, reporter: Reporter) -> int:
        check_at_least(
            1,
            max_k=self.max_k,
            max_queries=self.max_queries,
            max_query_chars=self.max_query_chars,
            max_inputs=self.max_inputs,
            max_input_chars=self.max_input_chars,
            max_body_bytes=self.max_body_bytes,
            max_waiting=self.max_waiting,
            max_connections=self.max_connections,
            max_connections_per_client=self.max_connections_per_client,
            batch=self.batch,
        )
        try:
            import jinja2  # noqa: F401
            import prometheus_client  # noqa: F401
            import python_multipart  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise InputError(
                'serving needs starlette, uvicorn and others: pip install "dense-retriever[serve]"'
            ) from None
        from index.ann.index import Index
        from retriever.serve.app import make_app
        from retriever.serve.batching import Batching, Engine, warm_up
        from retriever.serve.changes import Changes
        from retriever.serve.connections import ConnectionLimits, Connections, run_server, within_file_limit
        from retriever.serve.guard import allowed_names
        from retriever.serve.metrics import Metrics
        from retriever.serve.reload import Reloader
        from retriever.serve.requests import Limits
        from retriever.serve.thumbnails import Thumbnails
        from retriever.utils.device import choose_device
        from retriever.utils.indexes import check_index_device, open_indexes, place_index

        token = self._token()
        check_index_device(self.index_device)
        device = choose_device(self.device)
        limits = Limits(
            self.max_body_bytes,
            self.max_query_chars,
            self.max_queries,
            self.max_k,
            self.max_inputs,
            self.max_input_chars,
        )
        batching = Batching(self.batch, self.batch_ms / 1000, max(self.max_waiting, self.max_queries))

        def opened(show: Reporter) -> tuple[Index | MultiIndex, HybridIndex | None]:
            index = open_indexes(self.index, show, mmap=self.mmap, verify=self.verify)
            place_index(index, device, reporter, **self.index_options())
            return index, self._with_bm25(index) if self.hybrid else None

        def reopen() -> Index | MultiIndex:
            index, hybrid = opened(SilentReporter())
            engine.replace(index, hybrid)
            if images is not None:
                images.replace(index)
            return index

        def reloaded(outcome: str, line: str) -> None:
            metrics.reload(outcome)
            reporter.line(line)

        # Before the index is opened, so that no change is missed.
        reloader = Reloader(self.index, self.reload_seconds, reopen, reloaded)
        index, hybrid = opened(reporter)
        images = None if self.images is None else Thumbnails(self.images, index)
        # Before the model is loaded, so that a port in use is reported at once.
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listening(self.host, self.port))
            model = self.load(reporter)
            metrics = Metrics()
            engine = stack.enter_context(Engine(model.towers, index, model.options, batching, metrics.batch, hybrid))
            warm_up(engine)
            if self.reload_seconds:
                stack.enter_context(reloader)
            connections = Connections(
                ConnectionLimits(
                    self.max_connections_per_client,
                    within_file_limit(self.max_connections),
                    self.header_seconds,
                    self.idle_seconds,
                    self.stop_seconds,
                )
            )
            metrics.watch("connections", lambda: len(connections))
            changes = None
            if self.allow_changes and isinstance(index, Index):
                changes = stack.enter_context(Changes(engine, index, limits, reloader.look, reporter.line))
            app = make_app(
                engine,
                limits,
                reporter.line,
                images,
                name=self.model_name or self.model,
                metrics=metrics,
                names=allowed_names(self.host, self.allowed_host),
                token=token,
                changes=changes,
            )
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}/"
            reporter.line(f"serving {index.rows} passages on {address}; Ctrl-C stops")
            run_server(app, listener, connections)
        reporter.line("stopped")
        return 0

    def _with_bm25(self, index: Index | MultiIndex) -> HybridIndex:
        from retriever.searching.hybrid import HybridIndex

        stopwords = None if self.bm25_stopwords == "none" else self.bm25_stopwords
        return HybridIndex(index, self.fusion, self.dense_weight, stopwords)

    def _token(self) -> str | None:
        """The token that requests must have.

        Raises:
            InputError: The file has none.
            ConfigError: Other machines reach the service, and there is none.
        """
        from retriever.serve.guard import is_loopback

        if self.token_file is not None:
            from index.records import read_lines

            token = next(iter(read_lines(self.token_file)), "").strip()
            if not token:
                raise InputError(f"{self.token_file}: expected a token in the first line, found none")
            return token
        if self.token is None and not self.without_token and not is_loopback(self.host):
            raise ArgumentError(
                "host", f"{self.host} accepts other machines: expected --token or --token-file, or --without-token"
            )
        return self.token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Inherited by connections. asyncio sets it only on sockets made with a protocol number, and without it a body
        # waits 40 ms for its header's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {os.strerror(error.errno or 0)}") from None
