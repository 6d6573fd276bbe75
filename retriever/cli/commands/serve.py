"""`retriever serve`."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from index.files import InputError
from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch
from retriever.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class Serve(Embedding):
    """Answer queries over HTTP: JSON at /search, a page at /, and /healthz. Ctrl-C or SIGTERM stops the service."""

    index: UseAppendAction[tuple[Path, ...]]
    """Folder of `retriever index build`. May be repeated: the indexes are searched as one."""
    mmap: Switch = False
    """Memory-map the index instead of loading it, for indexes larger than memory."""
    verify: Switch = False
    """Check the sha256 of every file of the index first, which reads all of it. By default, index.faiss (with --mmap
    only up to 256 MiB) and lists on disk of up to 256 MiB are checked, and of other files the parts that are read."""
    images: Annotated[Path | None, arg(aliases=["--pictures"])] = None
    """Folder of the images that were indexed; the page then shows the images found."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 accepts requests from other machines; there is no authentication."""
    port: int = 8000
    """Port to listen on; 0: a free port."""
    max_k: int = 100
    """Most results per query."""
    max_queries: int = 64
    """Most queries per request."""
    max_query_chars: int = 4096
    """Most characters per query."""
    max_body_bytes: int = 262144
    """Most bytes per request."""
    max_waiting: int = 512
    """Most queries waiting for an answer; further ones are refused with status 429."""
    batch: int = 32
    """Most queries per batch of the model; 1: no batching."""
    batch_ms: float = 3.0
    """Milliseconds that a query waits for others to share a batch with."""

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError("--index: expected at least one folder, found none")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port: expected a number from 0 to 65535, found {self.port}")
        if not 0 <= self.batch_ms <= 1000:
            raise ValueError(f"--batch-ms: expected a number from 0 to 1000, found {self.batch_ms}")

    def run(self, reporter: Reporter) -> int:
        check_at_least(
            1,
            max_k=self.max_k,
            max_queries=self.max_queries,
            max_query_chars=self.max_query_chars,
            max_body_bytes=self.max_body_bytes,
            max_waiting=self.max_waiting,
            batch=self.batch,
        )
        try:
            import jinja2  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn
        except ImportError:
            raise InputError(
                'serving needs starlette, uvicorn and jinja2: pip install "dense-retriever[serve]"'
            ) from None
        from retriever.searching.search import open_indexes
        from retriever.serve.app import make_app
        from retriever.serve.batching import Batching, Engine, warm_up
        from retriever.serve.requests import Limits
        from retriever.serve.thumbnails import Thumbnails

        limits = Limits(self.max_body_bytes, self.max_query_chars, self.max_queries, self.max_k)
        batching = Batching(self.batch, self.batch_ms / 1000, max(self.max_waiting, self.max_queries))
        index = open_indexes(self.index, reporter, mmap=self.mmap, verify=self.verify)
        images = None if self.images is None else Thumbnails(self.images, index)
        # Before the model is loaded, so that a port in use is reported at once.
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listening(self.host, self.port))
            model = self.load(reporter)
            engine = stack.enter_context(Engine(model.towers, index, model.options, batching))
            warm_up(engine)
            config = uvicorn.Config(
                make_app(engine, limits, reporter.line, images),
                log_config=None,
                access_log=False,
                server_header=False,
                # Connections: many more than can be answered at once, far fewer than the machine allows.
                limit_concurrency=1024,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=10,
            )
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}/"
            reporter.line(f"serving {index.rows} passages on {address}; Ctrl-C stops")
            # uvicorn shuts down gracefully on a signal, then raises it again.
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        reporter.line("stopped")
        return 0


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
