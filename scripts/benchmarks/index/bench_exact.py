"""Exact search against a plain matrix product with top-k, and on a CPU against faiss and beir, in one process.

    python scripts/benchmarks/index/bench_exact.py --device cuda --rows 1000000 --dim 768 --queries 10000 --k 100

Every ranking is checked against float64 before its time is printed. The bits of our results must not depend on the
block size or, for some queries, on the device. Rows are written to exact.csv; `of_bare` is the time divided by that of
the fastest plain product with top-k, which on a GPU is in half precision. Needs torch and numpy; on a CPU also faiss
and beir.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from index.exact import search as exact
from scripts import RESULTS
from scripts.benchmarks.index import faiss_rescored
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.timing import Times, synchronize, time_alternately

BLOCK = 16384
# Takes 5 GiB of products for 10,000 queries, which most programs would not spend.
LARGE_BLOCK = 131072
CHECKED = 50
RESCORED = "faiss and exact re-scoring"
# Block sizes that must give the same bits as the default.
OTHER_BLOCKS = (5000, 16384)

Found = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Measure one size and write its rows."""
    options = parse_arguments()
    check_installed(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    passages, queries = vectors(options)
    expected = best_in_float64(passages, queries, options.k)
    ids = [f"d{row}" for row in range(options.rows)]
    make_methods = gpu_methods if options.device == "cuda" else cpu_methods
    methods = make_methods(passages, queries, ids, options.k)
    if unknown := set(options.profile) - set(methods):
        sys.exit(f"--profile: expected some of {', '.join(map(repr, methods))}, found {unknown.pop()!r}")
    same_bits(passages, queries, ids, options.k)
    if RESCORED in methods:
        ours = exact.search(queries.cpu().numpy(), [(0, passages)], ids, options.k, device=options.device)
        compare(RESCORED, methods[RESCORED](), ours)

    def check_first(name: str, number: int, found: Found) -> None:
        if number == 0:
            check(name, found, expected, options.k)

    times = time_alternately(methods, options.repeats, on_result=check_first)
    medians = {name: Times(*map(statistics.median, zip(*each, strict=True))) for name, each in times.items()}
    write(options, medians)
    for name in options.profile:
        profile(name, methods[name])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=100_000, help="passages (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="dimensions (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="queries (default: %(default)s)")
    parser.add_argument("--k", type=int, default=100, help="results per query (default: %(default)s)")
    parser.add_argument(
        "--data",
        choices=("uniform", "clustered"),
        default="clustered",
        help="distribution on the unit sphere (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of torch and faiss; 0 keeps their default (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--profile", nargs="*", default=[], metavar="METHOD", help="methods to profile by operation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for exact.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def check_installed(device: str) -> None:
    """Exit with one line if a GPU or a package is missing, before anything is generated."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a GPU that torch can use, found none")
    packages = {"faiss": "faiss-cpu", "beir": "beir"} if device == "cpu" else {}
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"expected packages that ours is compared with: pip install {' '.join(missing)}")


def vectors(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Passages [N, D] and queries [Q, D] of unit length, generated on the device that searches them.

    Clustered vectors lie around N / 200 centers, like topics.
    """
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    centers = torch.randn(max(1, options.rows // 200), options.dim, generator=generator, device=device)

    def some(count: int) -> torch.Tensor:
        made = torch.empty(count, options.dim, device=device)
        for part in made.split(65536):
            part.normal_(generator=generator)
            if options.data == "clustered":
                part += centers[torch.randint(len(centers), (len(part),), generator=generator, device=device)]
            part /= part.norm(dim=1, keepdim=True)
        return made

    return some(options.rows), some(options.queries)


def gpu_methods(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> dict[str, Callable[[], Found]]:
    """On a GPU: ours and the plain product with top-k, from main memory and from GPU memory."""
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
        **faiss_gpu_methods(passages, queries, ids, k),
    }


def faiss_gpu_methods(
    passages: np.ndarray, queries: np.ndarray, ids: list[str], k: int
) -> dict[str, Callable[[], Found]]:
    """faiss's own brute force on the GPU, with vectors that are there; none where faiss has no GPU support."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        return {}
    flat = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), passages.shape[1])
    flat.add(passages)
    return {
        "faiss GpuIndexFlatIP": lambda: flat.search(queries, k),
        RESCORED: lambda: faiss_rescored.search(queries, passages, ids, k, flat.search),
    }


def cpu_methods(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> dict[str, Callable[[], Found]]:
    """On a CPU: ours, the plain product with top-k, faiss and beir."""
    import faiss

    passages, queries = there.numpy(), asked.numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(passages.shape[1])
    flat.add(passages)
    search = beir_search(passages, queries, k)

    def ours() -> Found:
        return exact.search(queries, [(0, passages)], ids, k)

    def ours_as_a_run() -> Found:
        # The format that beir returns: a dictionary of scores per query.
        scores, rows = ours()
        for some_scores, some_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            dict(zip([ids[row] for row in some_rows], some_scores, strict=True))
        return scores, rows

    return {
        "bare float32 product": lambda: bare(there, asked, k, product, top=False),
        "bare float32 product and top-k": lambda: bare(there, asked, k, product),
        "faiss IndexFlatIP": lambda: flat.search(queries, k),
        RESCORED: lambda: faiss_rescored.search(queries, passages, ids, k, flat.search),
        "beir DenseRetrievalExactSearch": search,
        "ours": ours,
        "ours, as dictionaries like beir's": ours_as_a_run,
    }


def product(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Product in float32."""
    return queries @ passages.T


def half_product(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Product in float16, accumulated and returned in float32."""
    return torch.mm(queries.half(), passages.half().T, out_dtype=torch.float32)


def bare(
    passages: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    block: int = BLOCK,
    top: bool = True,
) -> Found:
    """Plain top-k: products in blocks, the top k of each block, and of those the top k. Ties are not ordered."""
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
    """beir's search with a model that returns precomputed vectors."""
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    class Ready:
        def encode_queries(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(queries)

        def encode_corpus(self, documents: list[dict[str, str]], **_: object) -> torch.Tensor:
            first = int(documents[0]["text"])
            return torch.from_numpy(passages[first : first + len(documents)])

    # beir sorts the corpus by text length, so all texts have equal length.
    corpus = {f"d{row}": {"text": f"{row:09d}"} for row in range(len(passages))}
    asked = {f"q{query}": "" for query in range(len(queries))}

    def search() -> Found:
        found = DenseRetrievalExactSearch(Ready()).search(corpus, asked, k, "dot")
        ranked = [sorted(found[query].items(), key=lambda pair: -pair[1]) for query in asked]
        scores = np.array([[score for _, score in pairs] for pairs in ranked], np.float32)
        return scores, np.array([[int(name[1:]) for name, _ in pairs] for pairs in ranked])

    return search


def best_in_float64(passages: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[np.ndarray, Found]:
    """A sample of the queries, and their scores [S, k] as float32 and rows [S, k] in float64 precision."""
    sample = np.linspace(0, len(queries) - 1, min(CHECKED, len(queries))).astype(int)
    asked = queries[torch.from_numpy(sample).to(queries.device)].double()
    products = torch.cat([asked @ part.double().T for part in passages.split(65536)], dim=1)
    best, rows = products.topk(k, dim=1)
    return sample, (best.float().cpu().numpy(), rows.cpu().numpy())


def same_bits(there: torch.Tensor, asked: torch.Tensor, ids: list[str], k: int) -> None:
    """Check that other block sizes, and on a GPU also the CPU, give the same bits."""
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
    """Exit if any bit differs."""
    if not all(one.tobytes() == other.tobytes() for one, other in zip(found, expected, strict=True)):
        sys.exit(f"{name}: expected the bits of the default block size, found others")
    print(f"{name}: the same bits", file=sys.stderr)


def check(name: str, found: Found, truth: tuple[np.ndarray, Found], k: int) -> None:
    """Check a sample against float64: ours must have its exact scores, the others 97 % of its rows and 1e-3."""
    if name == "bare float32 product":
        return
    sample, (expected, rows) = truth
    scores = found[0][sample]
    if name.startswith("ours") or name == RESCORED:
        # Of a million float64 sums, a few round to another float32 number than the exact sum.
        if not (scores == expected).mean() > 0.9999 or np.abs(scores - expected).max() > 2.0**-23:
            sys.exit(f"{name}: expected the scores of float64, found others")
    elif np.abs(scores - expected).max() > 1e-3:
        sys.exit(f"{name}: expected scores within 1e-3 of float64's, found {np.abs(scores - expected).max()}")
    # A passage that ties with the last of the top k is as good.
    right = (found[1][sample][:, :, None] == rows[:, None, :]).any(axis=2) | (scores == expected[:, -1:])
    same = right.mean()
    print(f"{name}: {same:.4%} of the rows of float64 on {len(sample)} queries", file=sys.stderr)
    least = 0.9999 if name.startswith("ours") else 0.97
    if same < least:
        sys.exit(f"{name}: expected {least:.2%} of the passages of float64, found {same:.2%}")


def write(options: argparse.Namespace, medians: dict[str, Times]) -> None:
    """Print the table and update its rows in exact.csv. Processor time is given besides wall time, because other
    programs disturb it less."""
    size = {name: str(getattr(options, name)) for name in ("device", "rows", "dim", "queries", "k", "data")}
    size["threads"] = str(torch.get_num_threads()) if options.device == "cpu" else ""
    here = machine(options.commit)
    # The fastest plain product with top-k, which on a GPU is in half precision.
    base = min(both for name, both in medians.items() if "top-k" in name or name.startswith("bare float16"))
    rows = []
    for name, (seconds, worked) in medians.items():
        shares = f"{seconds / base[0]:.3f}", f"{worked / base[1]:.3f}"
        times = {"seconds": f"{seconds:.4f}", "processor_seconds": f"{worked:.4f}"}
        ratios = {"of_bare": shares[0], "processor_of_bare": shares[1]}
        rows.append({**size, "method": name, **times, **ratios, **here})
        print(f"{seconds:8.3f} s ({shares[0]} of bare)  {worked:8.3f} processor s ({shares[1]})  {name}")
    update_rows(rows, options.results / "exact.csv", key=(*size, "hardware"))


def profile(name: str, call: Callable[[], Found]) -> None:
    """Print which operations one more call of a method spends its time on, the slowest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        call()
        synchronize()
    column = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(name, found.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60), sep="\n")


if __name__ == "__main__":
    main()
