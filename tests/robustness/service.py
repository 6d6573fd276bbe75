"""Script: a service with many clients, and with many connections that never finish their request.

    python tests/robustness/service.py --clients 200 --seconds 300 --half-open 1000 --csv figures.csv

Each client sends its next query after the answer. Half-open connections send a part of their headers, or nothing after
an answered request; they come from ten addresses, and are opened again when the service closes them. Meanwhile as many
clients as there were before ask on new connections. An answer other than status 200 with all results is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from scripts.benchmarks.retriever.bench_serve import make_index, start

RESULTS = 10
BEGINNINGS = (
    b"",
    b"POST /search HTTP/1.1\r\nHost: localhost\r\nx: ",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
)


class Load:
    """Clients that ask until a time has passed, and what they were answered."""

    def __init__(self, port: int, *, keep: bool) -> None:
        self._port, self._keep = port, keep
        self._lock = threading.Lock()
        self.latencies: list[float] = []
        self.failures: Counter[str] = Counter()

    def run(self, clients: int, seconds: float) -> None:
        """Ask with so many clients for so many seconds."""
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, until)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, until: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        asked = 0
        while time.monotonic() < until:
            began, asked = time.perf_counter(), asked + 1
            try:
                connection.request("POST", "/search", json.dumps({"query": f"query {number} {asked}", "k": RESULTS}))
                response = connection.getresponse()
                body = response.read()
                whole = response.status == 200 and len(json.loads(body)["results"]) == RESULTS
                failure = "" if whole else f"status {response.status}"
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                failure = type(error).__name__
                connection.close()
            if not self._keep:
                connection.close()
            with self._lock:
                self.latencies.append(time.perf_counter() - began)
                if failure:
                    self.failures[failure] += 1
        connection.close()


class HalfOpen:
    """Connections that never finish a request."""

    def __init__(self, port: int, count: int) -> None:
        self._port, self._count = port, count
        self._stop = threading.Event()
        self.opened = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> HalfOpen:
        self._thread.start()
        while self.opened < self._count:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            held: list[socket.socket] = []
            while not self._stop.is_set():
                while len(held) < self._count and not self._stop.is_set():
                    source = (f"127.0.1.{1 + self.opened % 10}", 0)
                    address = ("127.0.0.1", self._port)
                    held.append(stack.enter_context(socket.create_connection(address, 60, source_address=source)))
                    held[-1].sendall(BEGINNINGS[self.opened % len(BEGINNINGS)])
                    self.opened += 1
                held = [one for one in held if _is_open(one)]
                time.sleep(0.2)


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    connection.close()
    return False


def main(words: list[str]) -> int:
    """Measure both; the exit code is 1 if a request fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="time of the first part; the second takes a tenth")
    parser.add_argument("--half-open", type=int, default=100, help="connections that never finish a request")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--csv", type=Path, help="file of figures, one row per part")
    arguments = parser.parse_args(words)
    rows = []
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        process, port = start(make_index(Path(folder), arguments.passages), ())
        try:
            for part, seconds, held in (
                ("clients", arguments.seconds, 0),
                ("half-open connections", max(3.0, arguments.seconds / 10), arguments.half_open),
            ):
                load = Load(port, keep=not held)
                with HalfOpen(port, held) as half_open:
                    load.run(arguments.clients, seconds)
                rows.append(
                    {
                        "part": part,
                        "clients": arguments.clients,
                        "seconds": seconds,
                        "half_open": held,
                        "half_open_in_all": half_open.opened,
                        "requests": len(load.latencies),
                        "failed": load.failures.total(),
                        "median_ms": round(1000 * float(np.median(load.latencies))),
                        "p99_ms": round(1000 * float(np.quantile(load.latencies, 0.99))),
                    }
                )
                print(rows[-1], dict(load.failures), flush=True)
        finally:
            process.terminate()
            process.wait()
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
