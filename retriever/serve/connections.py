"""Connections of the service: time limits, bounds per client and in all, and a stop that answers what was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds for which a stopping service waits for requests that are already on the network.
DRAIN_SECONDS = 0.5
FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections."""

    per_client: int = 256
    """Maximum number of connections of one address."""
    total: int = 1024
    """Maximum number of connections."""
    header_s: float = 10.0
    """Seconds within which the headers of a request must arrive, from its first byte or the start of a connection."""
    idle_s: float = 15.0
    """Seconds after which a connection without a request is closed."""
    stop_s: float = 30.0
    """Maximum number of seconds for answering accepted requests when the service is stopped."""


def within_file_limit(total: int) -> int:
    """At most `total`, and at most half of the files that this process may open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return total
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return total if files == resource.RLIM_INFINITY else max(1, min(total, files // 2))


class Connections:
    """All connections. If one too many opens, the one that has waited longest for a request is closed.

    Half-open connections therefore never block new ones. If every connection is being answered, the new one gets status
    503.

    Args:
        limits: the limits.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.stopping = False
        self._per_client: Counter[str] = Counter()
        # Connections without a complete request, those that have waited longest first.
        self._waiting: dict[LimitedProtocol, None] = {}

    def __len__(self) -> int:
        return self._per_client.total()

    def add(self, connection: LimitedProtocol) -> bool:
        """Count a new connection; returns whether it is accepted."""
        self._per_client[connection.address] += 1
        self._waiting[connection] = None
        if self._per_client[connection.address] > self.limits.per_client:
            return self._close_oldest(connection, same_client=True)
        if len(self) > self.limits.total:
            return self._close_oldest(connection, same_client=False)
        return True

    def wait(self, connection: LimitedProtocol) -> None:
        """Note that a connection waits for a request."""
        self._waiting.setdefault(connection, None)

    def answer(self, connection: LimitedProtocol) -> None:
        """Note that a connection has sent a request."""
        self._waiting.pop(connection, None)

    def remove(self, connection: LimitedProtocol) -> None:
        """Forget a closed connection."""
        self._waiting.pop(connection, None)
        self._per_client[connection.address] -= 1
        if not self._per_client[connection.address]:
            del self._per_client[connection.address]

    def _close_oldest(self, new: LimitedProtocol, *, same_client: bool) -> bool:
        for other in self._waiting:
            if other is not new and (not same_client or other.address == new.address):
                self._waiting.pop(other)
                other.transport.abort()
                return True
        return False


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 with the limits of a `Connections`. uvicorn's own protocol waits for a first request without end."""

    def __init__(self, *arguments: Any, connections: Connections, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self.address = ""

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if self._all.add(self):
            self._close_after(DRAIN_SECONDS if self._all.stopping else self._all.limits.header_s)
        else:
            transport.write(FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep_open()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.answering:
            self._keep_open()
            self._all.answer(self)
            # The headers of the response, which are not sent yet, tell the client.
            self.cycle.keep_alive &= not self._all.stopping
        elif self._timer is None and not self.transport.is_closing():
            self._close_after(self._all.limits.header_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.answering and not self.transport.is_closing():
            self._all.wait(self)

    def shutdown(self) -> None:
        """Close the connection after the current request, or if none arrives within DRAIN_SECONDS."""
        if self.answering:
            super().shutdown()
        else:
            self._close_after(DRAIN_SECONDS)

    def _close_after(self, seconds: float) -> None:
        self._keep_open()
        self._timer = self.loop.call_later(seconds, self._close_if_waiting)

    def _keep_open(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_if_waiting(self) -> None:
        self._timer = None
        if not self.answering:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which accepts the connections that the kernel has queued before it stops listening.

    Args:
        config: its configuration.
        connections: all connections.
    """

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._all = connections

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, answer the accepted requests, and close."""
        self._all.stopping = True
        # Each pass of the event loop accepts what is queued, and then starts the protocol of each connection.
        for _ in range(4):
            await asyncio.sleep(0)
        await super().shutdown(sockets)


def run_server(app: ASGIApp, listener: socket.socket, connections: Connections, server: type[Server] = Server) -> None:
    """Serve an ASGI application on a listening socket until SIGINT or SIGTERM.

    Args:
        app: the application.
        listener: the socket.
        connections: holds the limits and counts the connections.
        server: class of the server.
    """
    limits = connections.limits

    def protocol(*arguments: Any, **named: Any) -> LimitedProtocol:
        return LimitedProtocol(*arguments, connections=connections, **named)

    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_s)),
        timeout_graceful_shutdown=max(1, round(limits.stop_s)),
    )
    # uvicorn shuts down gracefully on a signal, then raises it again.
    with contextlib.suppress(KeyboardInterrupt):
        server(config, connections).run(sockets=[listener])
