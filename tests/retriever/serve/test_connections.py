"""Slow, half-open and many connections do not keep others out; a stop answers what was accepted; hosts and tokens."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from base64 import b64encode
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from cli_helpers import command
from in_thread import Running, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from retriever.serve.guard import Guard, allowed_names

REQUEST = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.3 if request.url.path == "/slow" else 0)
    return PlainTextResponse("done")


APP = Starlette(routes=[Route("/slow", answer), Route("/fast", answer), Route("/healthz", answer)])


def connect(service: Running, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall(data)
    return connection


def ask(service: Running, path: str, **headers: str) -> int:
    """Status of a request; headers with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse().status


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    started = time.perf_counter()
    connection.settimeout(0.05)
    while time.perf_counter() - started < 10:
        with contextlib.suppress(TimeoutError):
            try:
                if not connection.recv(1000):
                    break
            except ConnectionError:
                break
        with contextlib.suppress(OSError):
            connection.sendall(drip)
    return time.perf_counter() - started


def test_silent_dripping_and_idle_connections_are_closed_in_time() -> None:
    with running(APP, header_s=0.4, idle_s=1.0) as service:
        for data, drip in ((b"", b""), (b"GET /fast HTTP/1.1\r\n", b"x: y\r\n")):
            assert 0.3 < seconds_until_closed(connect(service, data), drip) < 3
        # The second request begins on an idle connection and never ends.
        kept = connect(service, b"GET /fast HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET /fa")
        assert 0.3 < seconds_until_closed(kept) < 3
        idle = connect(service, b"GET /fast HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        assert 0.7 < seconds_until_closed(idle) < 4
        # An answer may take longer than a header.
        slow = connect(service, REQUEST.replace(b"/slow", b"/fast") + REQUEST)
        assert seconds_until_closed(slow) > 0.4


@pytest.mark.parametrize("limits", [{"per_client": 20}, {"total": 20}])
def test_half_open_connections_do_not_block_the_service(limits: dict[str, int]) -> None:
    with running(APP, **limits) as service, contextlib.ExitStack() as stack:
        half_open = [stack.enter_context(connect(service, b"GET /fast HTTP")) for _ in range(100)]
        assert [ask(service, "/fast") for _ in range(5)] == [200] * 5
        assert len(service.connections) <= 20
        # The newest of them are still open, and can be used.
        half_open[-1].sendall(b"/1.1\r\nHost: localhost\r\n\r\n")
        assert half_open[-1].recv(1000).startswith(b"HTTP/1.1 200")


def test_one_too_many_gets_503_while_all_others_are_answered() -> None:
    with running(APP, per_client=3) as service, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(service, REQUEST)) for _ in range(3)]
        time.sleep(0.1)
        assert ask(service, "/fast") == 503
        assert [each.recv(1000)[:12] for each in busy] == [b"HTTP/1.1 200"] * 3


def test_a_stop_answers_every_accepted_request() -> None:
    with running(APP) as service, contextlib.ExitStack() as stack:
        kept = stack.enter_context(connect(service, b"GET /fast HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        busy = [stack.enter_context(connect(service, REQUEST)) for _ in range(10)]
        stopping = threading.Thread(target=service.stop)
        late = [stack.enter_context(connect(service, REQUEST)) for _ in range(30)]
        stopping.start()
        kept.sendall(REQUEST)
        for each in (*busy, *late, kept):
            received = b""
            while block := each.recv(1000):
                received += block
            assert received.count(b"HTTP/1.1 200") == 1 and received.endswith(b"done")
        stopping.join()
        with pytest.raises(ConnectionRefusedError):
            connect(service)


def test_other_hosts_and_requests_without_the_token_are_refused() -> None:
    assert allowed_names("0.0.0.0", ()) is None
    names = allowed_names("127.0.0.1", ("search.example",))
    with running(Guard(APP, names, None)) as service:
        for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST:5", "search.example"):
            assert ask(service, "/fast", Host=host) == 200, host
        for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io:8000", "[::2]"):
            assert ask(service, "/fast", Host=host) == 421, host
    with running(Guard(APP, None, "sésame")) as service:
        basic = b64encode("any:sésame".encode()).decode()
        for value in ("Bearer sésame".encode().decode("latin-1"), f"Basic {basic}"):
            assert ask(service, "/fast", Authorization=value) == 200
        wrong: list[Any] = ["Bearer sesame", "Basic !", f"Basic {b64encode(b'a:b').decode()}", "sésame", "Digest x"]
        for value in wrong:
            assert ask(service, "/fast", Authorization=value) == 401, value
        assert ask(service, "/fast") == 401 and ask(service, "/healthz") == 200


def test_other_machines_need_a_token(world: Any, tmp_path: Any) -> None:
    arguments = ("serve", "--model", world.model, "--index", world.index, "--host", "0.0.0.0")
    outcome = command(*arguments)
    assert outcome.code == 2 and "--host: 0.0.0.0 accepts other machines: expected --token or" in outcome.err
    (tmp_path / "token").write_text("\n")
    outcome = command(*arguments, "--token-file", tmp_path / "token")
    assert outcome.code == 1 and "expected a token in the first line, found none" in outcome.err
