"""The service answers as the search command does, enforces its limits, and shuts down gracefully."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import MEANINGS, command
from serve_helpers import ROOT, Server, serving

from index.ann.index import Index
from index.files import InputError
from retriever.encoding.encoder import EncodeOptions
from retriever.models.modality import load_towers
from retriever.searching.search import Result, search
from retriever.serve import batching, page
from retriever.serve.app import make_app
from retriever.serve.batching import Batching, Busy, Closed, Engine
from retriever.serve.requests import Limits

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def server(world: Any) -> Iterator[Server]:
    limits = ("--max-k", 15, "--max-queries", 4, "--max-query-chars", 50, "--max-body-bytes", 2000)
    with serving(world.model, world.index, *limits) as running:
        yield running


@pytest.fixture(scope="module")
def towers(world: Any):
    return load_towers(str(world.model))


@pytest.fixture
def engine(world: Any, towers) -> Iterator[Engine]:
    with Engine(
        towers, Index.open(world.index), EncodeOptions(), Batching(max_queries=8, timeout_s=0.01, max_waiting=20)
    ) as running:
        yield running


def test_get_and_post_answer_as_the_search_command_does(world: Any, towers, server: Server) -> None:
    texts = ["what is a cat?", "what is a river?"]
    queries = [(str(n), text) for n, text in enumerate(texts)]
    expected = list(search(towers, Index.open(world.index), queries, 7, EncodeOptions(), batch=1))
    status, content, headers = server.ask("GET", "/search?query=what+is+a+cat%3F&k=7")
    assert status == 200 and headers["x-content-type-options"] == "nosniff"
    assert content["query"] == texts[0] and content["milliseconds"] > 0
    assert_same_results(content["results"], expected[0].results)
    status, content, _ = server.ask("POST", "/search", {"queries": texts, "k": 7})
    assert status == 200
    for answer, other in zip(content["answers"], expected, strict=True):
        assert_same_results(answer["results"], other.results)
    status, content, _ = server.ask("GET", "/search?query=a&query=b")
    assert [len(answer["results"]) for answer in content["answers"]] == [10, 10]


def assert_same_results(results: list[dict[str, Any]], expected: list[Result]) -> None:
    assert [result["id"] for result in results] == [result.id for result in expected]
    assert [(result["rank"], result["title"], result["text"]) for result in results] == [
        (result.rank, result.title, result.text) for result in expected
    ]
    np.testing.assert_allclose([r["score"] for r in results], [r.score for r in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method, path, body, status, message",
    [
        ("POST", "/search", {"query": "x", "k": 0}, 422, "k: expected a whole number from 1 to 15, found 0"),
        ("POST", "/search", {"query": "x", "k": 16}, 422, "k: expected a whole number from 1 to 15, found 16"),
        ("POST", "/search", {"query": "x", "k": True}, 422, "k: expected a whole number"),
        ("GET", "/search?query=x&k=1e1", None, 422, "k: expected a whole number from 1 to 15, found '1e1'"),
        ("GET", "/search?k=5", None, 422, "expected a parameter 'query'"),
        ("GET", "/search?query=x&depth=5", None, 422, "'k', 'filter', 'mode', found 'depth'"),
        ("POST", "/search", {"query": "x" * 51}, 422, "query: expected at most 50 characters, found 51"),
        ("POST", "/search", {"query": " \n"}, 422, "query: expected text, found none"),
        ("POST", "/search", {"query": 5}, 422, "query: expected text, found int"),
        ("POST", "/search", {"queries": "x"}, 422, "queries: expected a list, found str"),
        ("POST", "/search", {"queries": ["x"] * 5}, 422, "queries: expected 1 to 4 of them, found 5"),
        ("POST", "/search", {"query": "x", "queries": ["x"]}, 422, "expected either 'query' or 'queries'"),
        ("POST", "/search", ["x"], 422, "body: expected a JSON object, found list"),
        ("POST", "/search", b"{", 400, "body: expected JSON, found"),
        ("POST", "/search", b"\xff", 400, "body: expected UTF-8, found"),
        ("POST", "/search", b'{"query": "\\ud83d"}', 400, "half of a surrogate pair"),
        ("POST", "/search", b"[" * 1500, 400, "body: expected JSON, found"),
        ("POST", "/search", b" " * 2001, 413, "body: expected at most 2000 bytes, found 2001"),
        ("GET", "/nowhere", None, 404, "Not Found"),
        ("DELETE", "/search", None, 405, "Method Not Allowed"),
    ],
)
def test_invalid_requests_get_a_one_line_error(
    server: Server, method: str, path: str, body: object, status: int, message: str
) -> None:
    returned, answer, _ = server.ask(method, path, body)
    assert (returned, list(answer)) == (status, ["error"])
    assert message in answer["error"] and "\n" not in answer["error"]
    assert server.ask("GET", "/healthz")[0] == 200


def test_a_chunked_body_is_refused_at_the_limit(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"bb8\r\n" + b" " * 3000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_answers_do_not_wait_for_acknowledgements(server: Server) -> None:
    """Without TCP_NODELAY, a body that is sent after its header arrives 40 ms later."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    durations = []
    for _ in range(20):
        started = time.perf_counter()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        durations.append(time.perf_counter() - started)
    connection.close()
    assert min(durations[5:]) < 0.03


def test_health_describes_the_index(server: Server) -> None:
    status, state, _ = server.ask("GET", "/healthz")
    assert status == 200
    assert state == {"status": "ok", "passages": 20, "dim": 32, "factory": "Flat", "waiting": 0}


def test_the_page_shows_passages_and_problems_and_escapes_everything(server: Server) -> None:
    status, text, headers = server.ask("GET", "/?q=%3Cscript%3Ealert(1)%3C/script%3E%22&k=3")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&#34;" in text
    assert text.count("<li>") == 3
    assert "default-src 'none'" in headers["content-security-policy"]
    status, text, _ = server.ask("GET", "/?q=x&k=99")
    assert status == 422 and "k: expected a whole number from 1 to 15" in text
    status, text, _ = server.ask("GET", "/")
    assert status == 200 and "20 passages" in text


def test_the_page_shows_the_images_of_passages_that_have_one() -> None:
    from retriever.searching.search import Answer

    results = [Result(1, 0.5, "a", "<b>", "text & more"), Result(2, 0.25, "b", "", "plain")]
    text = page.render(
        k=2,
        answer=Answer("", "x", results),
        passages=2,
        max_characters=9,
        image_url=lambda result: '/images/"a".png' if result.id == "a" else None,
    )
    assert text.count("<img") == 1 and 'src="/images/&#34;a&#34;.png"' in text
    assert "&lt;b&gt;" in text and "text &amp; more" in text


def test_concurrent_queries_share_batches_and_get_their_own_answers(world: Any, towers, monkeypatch) -> None:
    sizes: list[int] = []
    embed = batching.embed_counted

    def counting(towers, texts, side, options):
        sizes.extend([len(texts)] if texts else [])
        return embed(towers, texts, side, options)

    monkeypatch.setattr(batching, "embed_counted", counting)
    words = list(MEANINGS) * 2
    with Engine(towers, Index.open(world.index), EncodeOptions(), Batching(max_queries=16, timeout_s=0.2)) as engine:
        futures = [engine.submit([f"define {word}"], 1 + n % 3) for n, word in enumerate(words)]
        together = [future.result(timeout=60)[0] for future in futures]
        assert engine.waiting == 0
    assert len(sizes) < len(words) / 2 and sum(sizes) == len(words)
    queries = [(str(n), f"define {word}") for n, word in enumerate(words)]
    alone = list(search(towers, Index.open(world.index), queries, 3, EncodeOptions(), batch=1))
    for n, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert [result.id for result in one.results] == [result.id for result in other.results][: 1 + n % 3]


def test_queries_beyond_the_queue_are_refused_and_the_others_answered(engine: Engine, monkeypatch) -> None:
    proceed, embed = threading.Event(), batching.embed_counted

    def blocked(*arguments: Any) -> Any:
        assert proceed.wait(30)
        return embed(*arguments)

    monkeypatch.setattr(batching, "embed_counted", blocked)
    accepted = [engine.submit(["cat"] * 5, 2) for _ in range(4)]
    with pytest.raises(Busy):
        engine.submit(["dog"], 1)
    proceed.set()
    assert [len(future.result(timeout=60)) for future in accepted] == [5] * 4
    assert len(engine.submit(["dog"], 1).result(timeout=60)[0].results) == 1


def test_an_answered_client_can_submit_again_at_once(engine: Engine, monkeypatch) -> None:
    waiting: list[int] = []
    for fails in (False, True):
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(batching, "embed_counted", lambda *_: 1 / 0)
            future = engine.submit(["cat"] * 3, 1)
            future.add_done_callback(lambda _: waiting.append(engine.waiting))
            assert (future.exception(timeout=60) is not None) == fails
    assert waiting == [0, 0]


def test_a_failing_batch_fails_only_its_own_clients(engine: Engine, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(batching, "embed_counted", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(["cat"], 1).result(timeout=60)
    assert engine.submit(["cat"], 1).result(timeout=60)[0].results
    assert engine.waiting == 0 and engine.alive


def test_a_closed_engine_answers_accepted_queries_and_accepts_no_more(engine: Engine) -> None:
    futures = [engine.submit(["cat"], 1) for _ in range(15)]
    engine.close()
    assert all(future.result(timeout=0)[0].results for future in futures)
    assert not engine.alive
    with pytest.raises(Closed):
        engine.submit(["cat"], 1)


def test_an_index_of_another_model_is_refused(world: Any, minilm: str) -> None:
    with pytest.raises(InputError, match="expected queries of the model that embedded its passages"):
        Engine(load_towers(minilm), Index.open(world.index), EncodeOptions(), Batching())


def test_a_busy_service_answers_429_and_shuts_down_after_accepted_requests(world: Any) -> None:
    flags = ("--max-waiting", 4, "--max-queries", 4, "--batch-ms", 500)
    with serving(world.model, world.index, *flags) as server, ThreadPoolExecutor(12) as pool:
        requests = [pool.submit(server.ask, "POST", "/search", {"queries": ["cat"] * 2}) for _ in range(12)]
        outcomes = [future.result() for future in requests]
        statuses = sorted(status for status, _, _ in outcomes)
        assert set(statuses) == {200, 429}
        refused = next((answer, headers) for status, answer, headers in outcomes if status == 429)
        assert refused[0]["error"].startswith("too many queries") and refused[1]["retry-after"] == "1"
        last = pool.submit(server.ask, "POST", "/search", {"query": "cat"})
        time.sleep(0.2)
        code, log = server.end(signal.SIGTERM)
        assert last.result()[0] == 200
    assert code == 0 and log.splitlines()[-1] == "stopped"
    assert log.count(" POST /search 200 ") == statuses.count(200) + 1


def test_a_port_in_use_and_invalid_flags_are_one_line_errors(world: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = command("serve", "--model", world.model, "--index", world.index, "--port", port)
    assert outcome.code == 1
    assert outcome.err == f"retriever: --host 127.0.0.1 --port {port}: Address already in use\n"
    for flag, value in (("--port", 70000), ("--batch-ms", -1), ("--max-k", 0)):
        outcome = command("serve", "--model", world.model, "--index", world.index, flag, value)
        assert outcome.code == 2 and flag in outcome.err and outcome.err.count("\n") == 1


def test_a_repeated_index_flag_adds_an_index(world: Any) -> None:
    outcome = command("serve", "--model", world.model, "--index", world.index, "--index", world.index, "--mmap")
    assert outcome.code == 1 and "expected other passages than those of" in outcome.err


def test_the_command_line_does_not_import_server_libraries() -> None:
    code = "import retriever.cli, sys; print([m for m in ('starlette', 'uvicorn', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_shuts_down_and_the_log_has_no_queries(server: Server) -> None:
    """Must be the last test that uses `server`, because it shuts it down."""
    server.ask("GET", "/search?query=secret")
    code, log = server.end(signal.SIGINT)
    assert code == 0 and "secret" not in log and "Traceback" not in log
    assert " 127.0.0.1 GET /search 200 " in log and " POST /search 413 " in log


def test_a_damaged_index_is_refused_or_fails_only_the_affected_queries(world: Any, towers, tmp_path: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(world.index, index)
    lines = (index / "passages.jsonl").read_bytes()
    (index / "passages.jsonl").write_bytes(lines.replace(b"acorns", b"acor\xffs"))
    with Engine(towers, Index.open(index), EncodeOptions(), Batching()) as engine:
        with pytest.raises(InputError, match=r"passages\.jsonl:3: expected UTF-8"):
            engine.submit(["what is an oak?"], 20).result()
        assert engine.alive and engine.submit(["what is a piano?"], 1).result()[0].results
        log: list[str] = []
        status, answer = asyncio.run(get(make_app(engine, Limits(), log.append), "/search", b"query=an+oak&k=20"))
    assert status == 500 and answer == {"error": "the search failed; see the service's log"}
    assert re.fullmatch(r"search failed: InputError: \S*passages\.jsonl:3: expected UTF-8, found: .*", log[0])
    data = (index / "index.faiss").read_bytes()
    (index / "index.faiss").write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))
    outcome = command("serve", "--model", world.model, "--index", index, "--port", 0)
    assert outcome.code == 1 and "index.faiss: damaged: expected sha256" in outcome.err
    assert len(outcome.err.splitlines()) == 1


async def get(app: Any, path: str, query: bytes) -> tuple[int, Any]:
    """Status and JSON content of a GET request to an ASGI application."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost")]
    target = {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": query}
    await app({"type": "http", "method": "GET", "headers": headers, "client": ("test", 1), **target}, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))
