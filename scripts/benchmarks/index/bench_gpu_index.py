"""Indexes on a GPU beside the same indexes on the CPU's cores: building, searching, serving, and graphs of CAGRA.

    python scripts/benchmarks/index/bench_gpu_index.py search [--rows 1000000 --dim 128]
    python scripts/benchmarks/index/bench_gpu_index.py serve [--serve-rows 1000000 --serve-dim 1024]
    python scripts/benchmarks/index/bench_gpu_index.py cagra [--cagra-rows 10000000 --cagra-dim 96]

Needs a faiss with GPU support; `cagra` needs one with cuVS. Without a GPU, `search` and `serve` measure the CPU alone.
Vectors are clustered and drawn on the GPU. `search` compares what both find. `serve` starts the service with a model
of random weights, in turns with its index on the CPU and on the GPU; clients are processes of their own. Rows replace
those of the same measurement in gpu_index.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import faiss
import numpy as np
import torch

from index.ann.build import Plan, build
from index.ann.factory import make
from index.ann.gpu import build as gpu_build
from index.ann.gpu.search import to_gpus
from index.ann.index import Index
from index.ann.settings import Settings
from index.exact import search as exact
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.row_numbers import RowNumberIds
from index.store.writer import EmbeddingWriter
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever import bench_serve
from scripts.datasets.index_sets import LATENT

K = 10
FACTORIES = ("IVF4096,Flat", "IVF4096,SQ8")
CLIENT_PROCESSES = 8
ROUNDS = 5
# Rows of vectors generated, and handed on, at once.
PIECE = 500_000


def main() -> None:
    """Run the measurements that were asked for and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("search", "serve", "cagra"))
    parser.add_argument("--rows", type=int, default=1_000_000, help="vectors of search (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="their dimensions (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=8_000, help="queries (default: %(default)s)")
    parser.add_argument("--nprobe", type=int, default=64, help="lists visited (default: %(default)s)")
    parser.add_argument("--factory", nargs="+", default=FACTORIES, help="default: %(default)s")
    parser.add_argument("--serve-rows", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--serve-dim", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--serve-factory", default="Flat", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round of serve (default: %(default)s)")
    parser.add_argument("--cagra-rows", type=int, default=10_000_000, help="default: %(default)s")
    parser.add_argument("--cagra-dim", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--cagra-factory", default="CAGRA64", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu_index.csv (default: %(default)s)")
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    options = parser.parse_args()
    measures: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
        "search": search_rows,
        "serve": serve_rows,
        "cagra": cagra_rows,
    }
    on = {**machine(options.commit), "faiss": faiss.__version__, "threads": faiss.omp_get_max_threads()}
    for what in options.what:
        for row in measures[what](options):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            update_rows([{**row, **on}], options.results / "gpu_index.csv", ("what", "index", "rows", "dim", "where"))


def search_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build each index, and search it on the CPU and on the GPU."""
    vectors, queries = clustered(options.rows, options.dim, options.queries, options.device)
    truth = best(vectors, queries, options.device)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "embeddings", vectors, {"sha256": "0" * 64})
        for factory in options.factory:
            started = time.perf_counter()
            build(store, Path(folder) / "index", Plan(factory, gpu=options.device != "cpu"))
            row = {
                "what": "search",
                "index": factory,
                "rows": options.rows,
                "dim": options.dim,
                "queries": options.queries,
                "build_s": round(time.perf_counter() - started, 2),
            }
            index = Index.open(Path(folder) / "index")
            Settings(nprobe=min(options.nprobe, options.rows)).apply(index.faiss)
            row["settings"] = str(Settings.of(index.faiss))
            seconds, found = fastest(lambda index=index: index.search_rows(queries, K))
            yield {**row, "where": "cpu", "search_s": round(seconds, 4), "recall_at_10": shares(found[1], truth)}
            if options.device == "cpu":
                continue
            index.to(options.device)
            on_gpu, found_there = fastest(lambda index=index: index.search_rows(queries, K))
            yield {
                **row,
                "where": index.device,
                "search_s": round(on_gpu, 4),
                "recall_at_10": shares(found_there[1], truth),
                "times_faster": round(seconds / on_gpu, 1),
                "same_rows": shares(found_there[1], found[1]),
                "largest_score_difference": f"{np.abs(found_there[0] - found[0]).max():.1e}",
            }


def serve_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Throughput of `retriever serve` with its index on the CPU and on the GPU; the model is on the GPU both times."""
    rows, dim = options.serve_rows, options.serve_dim
    vectors, _ = clustered(rows, dim, 1, options.device)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", dim)
        from retriever.models.modality import load_towers

        store = write_store(Path(folder) / "embeddings", vectors, load_towers(str(model), "cpu").fingerprint())
        del vectors
        build(store, Path(folder) / "index", Plan(options.serve_factory, gpu=options.device != "cpu"))
        rates: dict[str, float] = {}
        for where in ("cpu",) if options.device == "cpu" else ("cpu", options.device):
            flags = ("--index-device", where, "--device", options.device)
            process, port = bench_serve.start(Path(folder) / "index", flags, model)
            try:
                latencies, took = load(port, options.clients, options.seconds)
            finally:
                process.terminate()
                process.wait()
            rates[where] = len(latencies) / took
            row = {
                "what": "serve",
                "index": options.serve_factory,
                "rows": rows,
                "dim": dim,
                "where": where,
                "clients": options.clients,
                "queries_a_second": round(rates[where], 1),
                "median_ms": round(1000 * float(np.median(latencies)), 1),
                "p95_ms": round(1000 * float(np.quantile(latencies, 0.95)), 1),
            }
            yield row if where == "cpu" else {**row, "times_faster": round(rates[where] / rates["cpu"], 1)}


def cagra_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build a graph by CAGRA; search it on the GPU at several efforts, and on the CPU at one."""
    if not hasattr(faiss, "GpuIndexCagra"):
        sys.exit("cagra: expected a faiss with cuVS (pip install faiss-gpu-cuvs), found none")
    rows, dim = options.cagra_rows, options.cagra_dim
    vectors, queries = clustered(rows, dim, options.queries, options.device)
    truth = best(vectors, queries, options.device)
    torch.cuda.empty_cache()
    started = time.perf_counter()
    pieces = (vectors[start : start + PIECE] for start in range(0, rows, PIECE))
    index = gpu_build.build_graph(make(options.cagra_factory, dim), pieces, rows, lambda added: None)
    built = time.perf_counter() - started
    started = time.perf_counter()
    on_gpu = to_gpus(index, options.device)
    row = {
        "what": "cagra",
        "index": options.cagra_factory,
        "rows": rows,
        "dim": dim,
        "queries": options.queries,
        "build_s": round(built, 1),
        "copy_s": round(time.perf_counter() - started, 1),
    }
    for effort in (32, 64, 128, 256, 512):
        settings = Settings(ef_search=effort)
        on_gpu.apply(settings)
        seconds, found = fastest(lambda: on_gpu.search(queries, K))
        yield {
            **row,
            "where": f"{on_gpu.device}, {settings}",
            "search_s": round(seconds, 4),
            "recall_at_10": shares(found[1], truth),
        }
    for effort in (64, 256):
        settings = Settings(ef_search=effort)
        settings.apply(index)
        started = time.perf_counter()
        _, found_rows = index.search(queries, K)
        seconds = time.perf_counter() - started
        yield {
            **row,
            "where": f"cpu, {settings}",
            "search_s": round(seconds, 4),
            "recall_at_10": shares(found_rows, truth),
        }


def clustered(rows: int, dim: int, queries: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [rows, dim] and [queries, dim] float32, distributed as in scripts/datasets/index_sets.py."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    clusters = max(1, rows // 100)
    basis, centers = normal(LATENT, dim) / dim**0.5, normal(clusters, LATENT)
    # Inverse of the distribution whose density falls as the square root.
    shares_of = torch.arange(1, clusters + 1, device=device, dtype=torch.float64) ** -0.5
    bounds = torch.cumsum(shares_of, 0) / shares_of.sum()
    made = np.empty((rows + queries, dim), np.float32)
    for start in range(0, len(made), PIECE):
        piece = made[start : start + PIECE]
        drawn = torch.rand(len(piece), generator=generator, device=device, dtype=torch.float64)
        chosen = torch.searchsorted(bounds, drawn).clamp_(max=clusters - 1)
        latent = centers[chosen] + normal(len(piece), LATENT)
        each = latent @ basis + 0.06 * (LATENT / dim) ** 0.5 * normal(len(piece), dim)
        piece[:] = torch.nn.functional.normalize(each, dim=1).cpu().numpy()
    return made[:rows], made[rows:]


def best(vectors: np.ndarray, queries: np.ndarray, device: str) -> np.ndarray:
    """The rows [Q, K] of exact search."""
    shards = ((start, vectors[start : start + PIECE]) for start in range(0, len(vectors), PIECE))
    return exact.search(queries, shards, RowNumberIds(len(vectors)), K, device=device)[1]


def shares(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean share of the expected rows [Q, K] that were found."""
    hits = (found[:, :, None] == expected[:, None, :]).any(axis=1)
    return round(float(hits.mean()), 5)


def fastest(search: Callable[[], Any]) -> tuple[float, Any]:
    """The least time of several rounds, after one that warms up, and what was found."""
    found = search()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        search()
        times.append(time.perf_counter() - started)
    return min(times), found


def write_store(folder: Path, vectors: np.ndarray, model: dict[str, str]) -> EmbeddingStore:
    """A store of the vectors, with short passages."""
    header = {"dim": vectors.shape[1], "dtype": "float32", "model": model, "source": {"name": "clustered"}}
    with EmbeddingWriter(folder, **header) as writer:
        for start in range(0, len(vectors), PIECE):
            piece = vectors[start : start + PIECE]
            writer.append([Passage(str(start + row), "", "A passage.") for row in range(len(piece))], piece)
        writer.close()
    return EmbeddingStore.open(folder)


def random_model(folder: Path, dim: int) -> Path:
    """A model of two layers with random weights, as good as any for measuring a service."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "a", *bench_serve.WORDS]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=max(1, dim // 64),
        intermediate_size=4 * dim,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def load(port: int, clients: int, seconds: float) -> tuple[list[float], float]:
    """`bench_serve.load` by several processes, because one cannot send enough requests."""
    processes = min(CLIENT_PROCESSES, clients)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        # Half a second that is not counted: the service compiles and allocates.
        bench_serve.load(port, 2, 0.5)
        parts = list(
            pool.map(bench_serve.load, [port] * processes, [clients // processes] * processes, [seconds] * processes)
        )
    return [latency for latencies, _ in parts for latency in latencies], max(took for _, took in parts)


if __name__ == "__main__":
    main()
