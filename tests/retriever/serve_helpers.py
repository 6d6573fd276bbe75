"""Tests' `retriever serve` process, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """A running service on `port` of this machine."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Send a request; returns status, content (parsed if it is JSON) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read().decode()
        response_headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = response_headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, response_headers

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit code, and what was printed to standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(model: Path | str, index: Path, *flags: object) -> Iterator[Server]:
    """Serve `index` with `model` within the block."""
    arguments = ["serve", "--model", model, "--index", index, "--port", 0, *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "retriever", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        output, deadline = "", time.monotonic() + 120
        while (address := re.search(r"http://127\.0\.0\.1:(\d+)/", output)) is None:
            ready, _, _ = select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))
            line = process.stderr.readline() if ready else ""
            assert line, f"the service did not start: {output}"
            output += line
        yield Server(process, int(address[1]))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
