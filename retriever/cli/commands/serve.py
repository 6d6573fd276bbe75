"""`retriever serve`."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction

from index.files import InputError
from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch, check_counts


@dataclass(frozen=True, kw_only=True)
class Serve(Embedding):
    """Answer queries over HTTP: JSON at /search, a page for people at /, /healthz; Ctrl-C or SIGTERM ends it."""

    index: UseAppendAction[tuple[Path, ...]]
    """Folder that `retriever index build` wrote; given several times, the folders are searched as one."""
    mmap: Switch = False
    """Leave the index on disk and read what a search touches, for indexes larger than memory."""
    verify: Switch = False
    """Check the sha256 of every file of the index first, which reads all of it. Without, that of index.faiss is checked
    (with --mmap, up to 256 MiB) and that of lists on disk (up to 256 MiB), and of the other files what is read."""
    pictures: Path | None = None
    """The folder whose pictures were indexed: the page shows those that were found."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, for whom nothing is asked but queries."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_k: int = 100
    """Most passages a query."""
    max_queries: int = 64
    """Most queries a request."""
    max_query_chars: int = 4096
    """Most characters a query."""
    max_body_bytes: int = 262144
    """Most bytes of a request."""
    max_waiting: int = 512
    """Most queries waiting for their answer; more are refused with status 429."""
    batch: int = 32
    """Most queries embedded together; 1 turns that off."""
    batch_ms: float = 3.0
    """Milliseconds that a query waits for others to be embedded with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "max_k", "max_queries", "max_query_chars", "max_body_bytes", "max_waiting", "batch")
        if not self.index:
            raise ValueError("--index: expected at least one folder, found none")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port: expected a number from 0 to 65535, found {self.port}")
        if not 0 <= self.batch_ms <= 1000:
            raise ValueError(f"--batch-ms: expected a number from 0 to 1000, found {self.batch_ms}")

    def run(self, reporter: Reporter) -> int:
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
        from retriever.serve.images import Pictures
        from retriever.serve.requests import Limits

        limits = Limits(self.max_body_bytes, self.max_query_chars, self.max_queries, self.max_k)
        batching = Batching(self.batch, self.batch_ms / 1000, max(self.max_waiting, self.max_queries))
        index = open_indexes(self.index, reporter, mmap=self.mmap, verify=self.verify)
        pictures = None if self.pictures is None else Pictures(self.pictures, index)
        # Listening before the model is loaded makes a port in use known at once.
        with (
            _listening(self.host, self.port) as listener,
            Engine(self.towers(reporter), index, self.options(), batching) as engine,
        ):
            warm_up(engine)
            config = uvicorn.Config(
                make_app(engine, limits, reporter.line, pictures),
                log_config=None,
                access_log=False,
                server_header=False,
                # Connections: far more than can be answered at a time, far fewer than a machine has.
                limit_concurrency=1024,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=10,
            )
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}/"
            reporter.line(f"serving {index.rows} passages on {address}; Ctrl-C ends")
            # The server ends in good order at a signal, and then hands the signal on.
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        reporter.line("ended")
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
