"""Licenses, advisories, and a wheel with the same bytes each time."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from scripts import supply_chain


class Advisories(BaseHTTPRequestHandler):
    """Answers as OSV does: every package named old has an advisory."""

    def do_POST(self) -> None:
        """Answer a batch of queries."""
        queries = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
        results = [{"vulns": [{"id": "GHSA-1"}]} if query["package"]["name"] == "old" else {} for query in queries]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"results": results}).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_advisories_are_listed_by_package() -> None:
    with HTTPServer(("127.0.0.1", 0), Advisories) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        found = supply_chain.advisories({"new": "2.0", "old": "1.0"}, f"http://127.0.0.1:{server.server_port}/")
    assert found == {"old": ["GHSA-1"]}


def test_without_a_network_advisories_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens on the port 9 of this machine.
    monkeypatch.setattr(supply_chain, "OSV", "http://127.0.0.1:9/")
    monkeypatch.setattr(supply_chain.advisories, "__defaults__", ("http://127.0.0.1:9/",))
    monkeypatch.setattr("sys.argv", ["supply_chain.py", "--advisories"])
    assert supply_chain.main() == 1
    output = capsys.readouterr()
    assert output.err.startswith("supply_chain: http://127.0.0.1:9/: cannot be asked for advisories: ")
    assert output.err.count("\n") == 1 and "torch\t" in output.out


@pytest.mark.slow
def test_the_wheel_is_built_twice_with_the_same_bytes() -> None:
    assert supply_chain.wheel_sha256() == supply_chain.wheel_sha256()
