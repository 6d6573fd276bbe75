"""A service in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import uvicorn

from retriever.serve import connections
from retriever.serve.connections import ConnectionLimits, Connections, run_server


@dataclass
class Running:
    """A service on `port` of this machine."""

    port: int
    connections: Connections
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stop it as a signal does, and wait for its end."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(app: Any, **limits: Any) -> Iterator[Running]:
    """Serve an application within the block."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    all_connections = Connections(replace(ConnectionLimits(), **limits))
    servers: list[uvicorn.Server] = []
    started = threading.Event()

    class Server(connections.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            servers.append(self)
            started.set()

    def serve() -> None:
        run_server(app, listener, all_connections, Server)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(60)
    service = Running(port, all_connections, servers[0], thread)
    try:
        yield service
    finally:
        service.stop()
