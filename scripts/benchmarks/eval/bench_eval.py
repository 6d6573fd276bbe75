"""Search and metrics of an evaluation, after encoding: ours beside the beir package's, and ours alone at large sizes.

python scripts/benchmarks/eval/bench_eval.py  beside beir
python scripts/benchmarks/eval/bench_eval.py --device cuda --rows 1000000 --queries 10000 --k 100  ours alone
python scripts/benchmarks/eval/bench_eval.py --memory --rows 10000000 --dim 32 --queries 1000 --k 100

Values are compared before any time is printed: with beir's, or on a GPU the means with trec_eval's and the ranking of
some queries with float64's. processor_s is what the processors worked in that time, which other programs disturb less
than the clock. Rows go to eval.csv, in scripts/results or where --results says. On a machine that others use as well,
set OMP_WAIT_POLICY=passive. Needs torch and numpy, and what it is compared with: beir, or on a GPU pytrec_eval.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from eval.evaluate import exact_search, ranked_run, score
from eval.metrics import Metrics
from eval.ranking import RankedRun
from eval.sets.preflight import preflight
from index.beir import BeirDataset
from index.files import atomic_path
from index.store.reader import EmbeddingStore
from scripts import RESULTS
from scripts.benchmarks.index.bench_exact import best_in_float64, check
from scripts.benchmarks.machine import machine
from scripts.datasets.generated_set import embed, generate

MIB = 2**20
KS = (1, 3, 5, 10, 100, 1000)


def main() -> None:
    """Measure one size and keep its rows."""
    options = parse_arguments()
    check_installed(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        measure = memory if options.memory else speed
        rows = measure(options, Path(temporary))
    write(options, rows)


def parse_arguments() -> argparse.Namespace:
    """Sizes, and where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves them as they are")
    parser.add_argument("--memory", action="store_true", help="peak memory of every stage, in place of times")
    parser.add_argument("--folder", type=Path, help="for the generated corpus; the system's own by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the code, where there is no checkout to ask")
    return parser.parse_args()


def check_installed(options: argparse.Namespace) -> None:
    """Say what is missing before anything is generated."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a GPU that torch can use, found none")
    peer, package = ("pytrec_eval", "pytrec_eval-terrier") if options.device == "cuda" else ("beir", "beir")
    if not options.memory and importlib.util.find_spec(peer) is None:
        sys.exit(f"{peer} is not installed, and the values are compared with its: pip install {package}")


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds of search and metrics, ours and, on a CPU, beir's, in turns."""
    data, queries = generate(options, folder)
    dataset = BeirDataset.open(data)
    store = embed(options, data, folder / "store")
    ways: dict[str, Callable[[], tuple[dict[str, float], dict[str, float]]]] = {
        "ours": lambda: ours(options, dataset, store, queries)
    }
    if options.device == "cpu":
        ways["beir"] = lambda: theirs(options, dataset, store, queries)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    means: dict[str, dict[str, float]] = {}
    for _ in range(options.repeats + 1):
        # In turns, so that a noisy neighbour disturbs both alike; the first turn warms up.
        for name, way in ways.items():
            worked = time.process_time()
            seconds, means[name] = way()
            times[name].append({**seconds, "processor": time.process_time() - worked})
    if "beir" in means:
        for measure, value in means["beir"].items():
            # The package rounds to five digits.
            assert abs(means["ours"][measure] - value) < 5.1e-6, (measure, means["ours"][measure], value)
    else:
        run = run_of(options, dataset, store, queries)
        check_by_float64(options, store, queries, run)
        check_by_trec_eval(options, dataset, run, means["ours"])
    rows = []
    for name, turns in times.items():
        for turn in turns:
            turn["total"] = turn["search"] + turn["metrics"]
        stages = {stage: statistics.median(turn[stage] for turn in turns[1:] or turns) for stage in turns[0]}
        values = {"what": name, "first_total_s": turns[0]["total"], "ndcg@10": means[name]["ndcg@10"]}
        rows.append({**values, **{f"{stage}_s": seconds for stage, seconds in stages.items()}})
    if len(rows) == 2:
        ratios = (rows[1][column] / rows[0][column] for column in ("total_s", "processor_s"))
        print("beir takes {:.2f} times as long, {:.2f} times the processors, with the same values".format(*ratios))
    return rows


def run_of(options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray) -> RankedRun:
    """What `retriever evaluate beir` does after encoding, up to the run."""
    ids = store.ids()
    return ranked_run(dataset, ids, exact_search(store, ids, device=options.device), lambda: queries, options.k)


def ours(
    options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stage, and the means."""
    began = time.perf_counter()
    run = run_of(options, dataset, store, queries)
    searched = time.perf_counter()
    metrics: Metrics = score(dataset, run, options.k, KS)
    return {"search": searched - began, "metrics": time.perf_counter() - searched}, metrics.mean


class Embedded:
    """A model for the beir package that has embedded everything already: corpus vectors by id, queries in order."""

    def __init__(self, vectors: np.ndarray, queries: np.ndarray) -> None:
        self._vectors, self._queries = torch.from_numpy(vectors), torch.from_numpy(queries)

    def encode_queries(self, queries: list[str], **options: Any) -> Any:
        return self._queries

    def encode_corpus(self, corpus: list[dict[str, str]], **options: Any) -> Any:
        return self._vectors[[int(passage["text"].rpartition(" ")[2]) for passage in corpus]]


def theirs(
    options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The same by beir's exact search and its evaluation; what it needs in memory is there before the clock starts."""
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    corpus = {passage.id: {"title": passage.title, "text": passage.text} for passage in store.passages()}
    search = DenseRetrievalExactSearch(Embedded(store.vectors(), queries), show_progress_bar=False)
    cuts = [k for k in KS if k <= options.k]
    began = time.perf_counter()
    found = search.search(corpus, dataset.queries, options.k, "dot")
    searched = time.perf_counter()
    measured = EvaluateRetrieval.evaluate(dataset.qrels, found, cuts)
    seconds = {"search": searched - began, "metrics": time.perf_counter() - searched}
    names = {"NDCG": "ndcg", "MAP": "map", "Recall": "recall", "P": "precision"}
    values = {name: value for measures in measured for name, value in measures.items()}
    return seconds, {f"{names[name.partition('@')[0]]}@{name.partition('@')[2]}": v for name, v in values.items()}


def check_by_float64(options: argparse.Namespace, store: EmbeddingStore, queries: np.ndarray, run: RankedRun) -> None:
    """Scores and passages of some queries against those of products in float64."""
    vectors, asked = (torch.from_numpy(some).to(options.device) for some in (store.vectors(), queries))
    check("ours", (run.scores, run.rows), best_in_float64(vectors, asked, options.k), options.k)


def check_by_trec_eval(
    options: argparse.Namespace, dataset: BeirDataset, run: RankedRun, mean: dict[str, float]
) -> None:
    """Every mean against trec_eval's, of the same run."""
    import pytrec_eval

    cuts = [k for k in KS if k <= options.k]
    names = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "success": "success"}
    asked = {f"{theirs}.{','.join(map(str, cuts))}" for theirs in names.values()}
    found = pytrec_eval.RelevanceEvaluator(dataset.qrels, asked).evaluate(dict(run.items()))
    for measure, theirs in names.items():
        for k in cuts:
            value = sum(row[f"{theirs}_{k}"] for row in found.values()) / len(dataset.qrels)
            assert abs(mean[f"{measure}@{k}"] - value) < 1e-9, (measure, k)


def memory(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of every stage, beside what is mapped from files."""
    data, queries = generate(options, folder)
    rows = []

    def stage(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        with peak() as reached:
            value = work()
        rows.append({"what": name, "total_s": time.perf_counter() - began, "peak_mib": reached[0] / MIB})
        print(f"{name}: {reached[0] / MIB:,.0f} MiB, {rows[-1]['total_s']:.0f} s", flush=True)
        return value

    found = stage("preflight", lambda: preflight(data))
    assert found.passages == options.rows and not found.errors, found.errors
    store = stage("store", lambda: embed(options, data, folder / "store"))
    dataset = BeirDataset.open(data)
    _, mean = stage("search and metrics", lambda: ours(options, dataset, store, queries))
    rows[-1]["ndcg@10"] = mean["ndcg@10"]
    return rows


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Yields a list whose only entry becomes the largest anonymous memory of this process, in bytes, while inside."""
    reached, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            reached[0] = max(reached[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield reached
    finally:
        done.set()
        thread.join()
        reached[0] = max(reached[0], anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, as Linux counts it."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table, and put its rows in the place of those of the same size and hardware."""
    columns = ("search_s", "metrics_s", "total_s", "processor_s", "first_total_s", "peak_mib", "ndcg@10")
    size = {name: str(getattr(options, name)) for name in ("device", "rows", "dim", "queries", "k", "threads")}
    # Threads that wait by spinning lose most of their time where others use the cores too.
    load = {"omp_wait": os.environ.get("OMP_WAIT_POLICY", ""), "load": f"{os.getloadavg()[0]:.1f}"}
    measured = machine() | ({"commit": options.commit} if options.commit else {})
    found = []
    for row in rows:
        shown = (f"{name} {row[name]:.4f}" for name in columns if name in row)
        print(f"{row['what']:20}", "  ".join(shown))
        values = {name: f"{row[name]:.6g}" if name in row else "" for name in columns}
        found.append({"what": row["what"], **size, **load, **values, **measured})
    kept = []
    results = options.results / "eval.csv"
    if results.exists():
        same = {**size, "hardware": measured["hardware"]}
        whats = {row["what"] for row in found}
        with results.open(encoding="utf-8", newline="") as stream:
            kept = [
                row
                for row in csv.DictReader(stream)
                if row["what"] not in whats or any(row[name] != same[name] for name in same)
            ]
    with atomic_path(results) as path, path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, found[0].keys(), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *found])


if __name__ == "__main__":
    main()
