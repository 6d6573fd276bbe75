"""Exact search against the bare product with top-k, and on a CPU against faiss and beir, in one process.

python scripts/benchmarks/index/bench_exact.py --device cuda --rows 1000000 --dim 768 --queries 10000 --k 100

Every method's ranking is checked against float64 before its time is printed, and the bits of ours against those of
other block sizes and, for some queries, of the processor. Rows go to exact.csv, in scripts/results or where --results
says; `of_bare` is the share of the quickest bare product with top-k, which on a GPU is in half precision.
Needs torch and numpy; on a CPU faiss and beir too.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from index.exact import search as exact
from scripts import RESULTS
from scripts.benchmarks.machine import machine

BLOCK = 16384
# Of the products, 5 GiB for 10,000 queries: what a GPU's memory allows and a careful program would not.
LARGE_BLOCK = 131072
CHECKED = 50
# Sizes of ours, beside the default, that must give the same bits.
OTHER_BLOCKS = (5000, 16384)

Found = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Measure one size and keep its rows."""
    options = parse_arguments()
    check_installed(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    passages, queries = vectors(options)
    expected = best_in_float64(passages, queries, options.k)
    ids = [f"d{row}" for row in range(options.rows)]
    ways_there = gpu_ways if options.device == "cuda" else cpu_ways
    ways = ways_there(passages, queries, ids, options.k)
    if unknown := set(options.profile) - set(ways):
        sys.exit(f"--profile: expected some of {', '.join(map(repr, ways))}, found {unknown.pop()!r}")
    same_bits(passages, queries, ids, options.k)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        # In turns, so that a noisy neighbour disturbs all of them alike; the first turn warms up and is checked.
        for name, way in ways.items():
            synchronize()
            started, worked = time.perf_counter(), time.process_time()
            found = way()
            synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started, time.process_time() - worked))
            else:
                check(name, found, expected, options.k)
    write(options, {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in seconds.items()})
    for name in options.profile:
        profile(name, ways[name])


def parse_arguments() -> argparse.Namespace:
    """Sizes, and where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--data", choices=("uniform", "clustered"), default="clustered", help="on the unit sphere")
    parser.add_argument("--threads", type=int, default=0, help="of torch and faiss; 0 leaves them as they are")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", nargs="*", default=[], metavar="METHOD", help="say what its time goes into")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for exact.csv")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def check_installed(device: str) -> None:
    """Say what is missing before anything is generated."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a GPU that torch can use, found none")
    packages = {"faiss": "faiss-cpu", "beir": "beir"} if device == "cpu" else {}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed, and compared with: pip install {' '.join(missing)}")


def vectors(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Passages [N, D] and queries [Q, D] of unit length, made where they are searched.

    Clustered ones lie around N / 200 centres, as topics do.
    """
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(max(1, options.rows // 200), options.dim, generator=generator, device=device)

    def some(count: int) -> torch.Tensor:
        made = torch.empty(count, options.dim, device=device)
        for part in made.split(65536):
            part.normal_(generator=generator)
            if options.data == "clustered":
                part += centres[torch.randint(len(centres), (len(part),), generator=generator, device=device)]
            part /= part.norm(dim=1, keepdim=True)
        return made

    return some(options.rows), some(options.queries)


def gpu_ways(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> dict[str, Callable[[], Found]]:
    """Ours and the bare product with top-k, from main memory and from the GPU's."""
    passages, queries = there.cpu().numpy(), asked.cpu().numpy()

    def ours(source: Any, block: int | None = None) -> Found:
        return exact.search(queries, [(0, source)], ids, k, device="cuda", block_rows=block)

    def ours_in_float32(source: Any) -> Found:
        with mock.patch.object(exact, "half_type", lambda device: None):
            return ours(source)

    return {
        "bare float16, vectors on the GPU": lambda: bare(there, asked, k, half_product),
        "bare float16, large blocks, vectors on the GPU": lambda: bare(there, asked, k, half_product, LARGE_BLOCK),
        "bare float32, vectors on the GPU": lambda: bare(there, asked, k, product),
        "bare float32, vectors in main memory": lambda: bare(torch.from_numpy(passages), asked, k, product),
        "ours, vectors on the GPU": lambda: ours(there),
        f"ours, blocks of {OTHER_BLOCKS[-1]}, vectors on the GPU": lambda: ours(there, OTHER_BLOCKS[-1]),
        "ours, float32 products, vectors on the GPU": lambda: ours_in_float32(there),
        "ours, vectors in main memory": lambda: ours(passages),
        "ours, float32 products, vectors in main memory": lambda: ours_in_float32(passages),
    }


def cpu_ways(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> dict[str, Callable[[], Found]]:
    """Ours, the bare product with top-k, faiss and beir."""
    import faiss

    passages, queries = there.numpy(), asked.numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(passages.shape[1])
    flat.add(passages)
    search = beir_search(passages, queries, k)

    def ours() -> Found:
        return exact.search(queries, [(0, passages)], ids, k)

    def ours_as_a_run() -> Found:
        # What beir returns, and evaluation needs: a dictionary of scores for each query.
        scores, rows = ours()
        for some_scores, some_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            dict(zip([ids[row] for row in some_rows], some_scores, strict=True))
        return scores, rows

    return {
        "bare float32 product": lambda: bare(there, asked, k, product, top=False),
        "bare float32 product and top-k": lambda: bare(there, asked, k, product),
        "faiss IndexFlatIP": lambda: flat.search(queries, k),
        "beir DenseRetrievalExactSearch": search,
        "ours": ours,
        "ours, as dictionaries like beir's": ours_as_a_run,
    }


def product(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """In float32, whatever the vectors are."""
    return queries @ passages.T


def half_product(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """In float16, summed and returned in float32."""
    return torch.mm(queries.half(), passages.half().T, out_dtype=torch.float32)


def bare(
    passages: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    block: int = BLOCK,
    top: bool = True,
) -> Found:
    """What anyone would write: products by blocks, the top k of each, and of those kept; no promise about ties."""
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.full((len(queries), k), -1, device=queries.device)
    for first in range(0, len(passages), block):
        products = multiply(queries, passages[first : first + block].to(queries.device))
        if top:
            values, columns = products.topk(min(k, products.shape[1]), dim=1)
            best, kept = torch.cat([best, values], dim=1).topk(k, dim=1)
            rows = torch.cat([rows, columns + first], dim=1).gather(1, kept)
    return best.cpu().numpy(), rows.cpu().numpy()


def beir_search(passages: np.ndarray, queries: np.ndarray, k: int) -> Callable[[], Found]:
    """beir's search, with a model that has its vectors ready."""
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    class Ready:
        def encode_queries(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(queries)

        def encode_corpus(self, documents: list[dict[str, str]], **_: object) -> torch.Tensor:
            first = int(documents[0]["text"])
            return torch.from_numpy(passages[first : first + len(documents)])

    # beir sorts the corpus by the length of its texts: equal lengths keep their order.
    corpus = {f"d{row}": {"text": f"{row:09d}"} for row in range(len(passages))}
    asked = {f"q{query}": "" for query in range(len(queries))}

    def search() -> Found:
        found = DenseRetrievalExactSearch(Ready()).search(corpus, asked, k, "dot")
        ranked = [sorted(found[query].items(), key=lambda pair: -pair[1]) for query in asked]
        scores = np.array([[score for _, score in pairs] for pairs in ranked], np.float32)
        return scores, np.array([[int(name[1:]) for name, _ in pairs] for pairs in ranked])

    return search


def best_in_float64(passages: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[np.ndarray, Found]:
    """A sample of the queries, and the scores [S, k], as float32, and rows [S, k] that float64 finds for it."""
    sample = np.linspace(0, len(queries) - 1, min(CHECKED, len(queries))).astype(int)
    asked = queries[torch.from_numpy(sample).to(queries.device)].double()
    products = torch.cat([asked @ part.double().T for part in passages.split(65536)], dim=1)
    best, rows = products.topk(k, dim=1)
    return sample, (best.float().cpu().numpy(), rows.cpu().numpy())


def same_bits(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> None:
    """Search with other block sizes, and on a GPU also by the processor: every bit must be that of the default."""
    queries, device = asked.cpu().numpy(), there.device.type
    expected = exact.search(queries, [(0, there)], ids, k, device=device)
    for block in OTHER_BLOCKS:
        found = exact.search(queries, [(0, there)], ids, k, device=device, block_rows=block)
        compare(f"blocks of {block}", found, expected)
    if device == "cuda":
        some = slice(0, CHECKED)
        found = exact.search(queries[some], [(0, there.cpu().numpy())], ids, k)
        compare("the processor", found, (expected[0][some], expected[1][some]))


def compare(name: str, found: Found, expected: Found) -> None:
    """Stop where a bit differs."""
    if not all(one.tobytes() == other.tobytes() for one, other in zip(found, expected, strict=True)):
        sys.exit(f"{name}: expected the bits of the default block size, found others")
    print(f"{name}: the same bits", file=sys.stderr)


def check(name: str, found: Found, truth: tuple[np.ndarray, Found], k: int) -> None:
    """Compare a sample with float64: ours must have its scores to the last bit, the others to 1e-3 and 97 % of rows."""
    if name == "bare float32 product":
        return
    sample, (expected, rows) = truth
    scores = found[0][sample]
    if name.startswith("ours"):
        # Of a million float64 sums a few round to another float32 number than the exact sum does.
        if not (scores == expected).mean() > 0.9999 or np.abs(scores - expected).max() > 2.0**-23:
            sys.exit(f"{name}: expected the scores of float64, found others")
    elif np.abs(scores - expected).max() > 1e-3:
        sys.exit(f"{name}: expected scores within 1e-3 of float64's, found {np.abs(scores - expected).max()}")
    # A passage that scores as the last of the best does is as good as one of them.
    right = (found[1][sample][:, :, None] == rows[:, None, :]).any(axis=2) | (scores == expected[:, -1:])
    same = right.mean()
    print(f"{name}: {same:.4%} of the rows of float64 on {len(sample)} queries", file=sys.stderr)
    least = 0.9999 if name.startswith("ours") else 0.97
    if same < least:
        sys.exit(f"{name}: expected {least:.2%} of the passages of float64, found {same:.2%} of them")


def write(options: argparse.Namespace, medians: dict[str, tuple[float, ...]]) -> None:
    """Print the table, and put its rows in the place of those of the same size and hardware.

    Beside the time on the clock stand the seconds that processors worked, which other programs disturb less.
    """
    size = {name: str(getattr(options, name)) for name in ("device", "rows", "dim", "queries", "k", "data")}
    size["threads"] = str(torch.get_num_threads()) if options.device == "cpu" else ""
    here = {**machine(), **({"commit": options.commit} if options.commit else {})}
    # The quickest bare product with top-k: in half precision on a GPU.
    base = min(both for name, both in medians.items() if "top-k" in name or name.startswith("bare float16"))
    rows = []
    for name, (seconds, worked) in medians.items():
        shares = f"{seconds / base[0]:.3f}", f"{worked / base[1]:.3f}"
        times = {"seconds": f"{seconds:.4f}", "processor_seconds": f"{worked:.4f}"}
        ratios = {"of_bare": shares[0], "processor_of_bare": shares[1]}
        rows.append({**size, "method": name, **times, **ratios, **here})
        print(f"{seconds:8.3f} s ({shares[0]} of bare)  {worked:8.3f} processor s ({shares[1]})  {name}")
    kept = []
    target = options.results / "exact.csv"
    if target.exists():
        with target.open(encoding="utf-8", newline="") as stream:
            same = {**size, "hardware": here["hardware"]}
            kept = [row for row in csv.DictReader(stream) if any(row[name] != same[name] for name in same)]
    options.results.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def profile(name: str, way: Callable[[], Found]) -> None:
    """Print what one more turn of a method spends its time on, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        way()
        synchronize()
    column = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(name, found.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60), sep="\n")


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
