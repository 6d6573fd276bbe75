"""Search and metrics of an evaluation, after encoding: ours against the beir package, or ours alone at large sizes.

    python scripts/benchmarks/eval/bench_eval.py
    python scripts/benchmarks/eval/bench_eval.py --device cuda --rows 1000000 --queries 10000 --k 100
    python scripts/benchmarks/eval/bench_eval.py --memory --rows 10000000 --dim 32 --queries 1000 --k 100

Values are checked before any time is printed: on a CPU against beir's; on a GPU the means against trec_eval's and the
ranking of some queries against float64. processor_s is the processor time of a stage, which other programs disturb less
than wall time. On a shared machine set OMP_WAIT_POLICY=passive. Rows are written to eval.csv. Needs torch and numpy,
and beir on a CPU or pytrec_eval on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
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
from index.store.reader import EmbeddingStore
from scripts import RESULTS
from scripts.benchmarks.index.bench_exact import best_in_float64, check
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.timing import MIB, time_alternately
from scripts.datasets.generated_set import embed, generate

KS = (1, 3, 5, 10, 100, 1000)


def main() -> None:
    """Measure one size and write its rows."""
    options = parse_arguments()
    check_installed(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        measure = memory if options.memory else speed
        rows = measure(options, Path(temporary))
    write(options, rows)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=100_000, help="passages (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="dimensions (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="queries (default: %(default)s)")
    parser.add_argument("--k", type=int, default=100, help="results per query (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of torch; 0 keeps its default (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure the peak memory of every stage instead of the time"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder for the generated corpus (default: the system's temporary folder)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for eval.csv (default: %(default)s)")
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    return parser.parse_args()


def check_installed(options: argparse.Namespace) -> None:
    """Exit with one line if a GPU or a package is missing, before anything is generated."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a GPU that torch can use, found none")
    peer, package = ("pytrec_eval", "pytrec_eval-terrier") if options.device == "cuda" else ("beir", "beir")
    if not options.memory and importlib.util.find_spec(peer) is None:
        sys.exit(f"expected the package {package}, which the values are checked against: pip install {package}")


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds of search and metrics: ours and, on a CPU, beir's, alternately."""
    data, queries = generate(options, folder)
    dataset = BeirDataset.open(data)
    store = embed(options, data, folder / "store")
    systems: dict[str, Callable[[], tuple[dict[str, float], dict[str, float]]]] = {
        "ours": lambda: ours(options, dataset, store, queries)
    }
    if options.device == "cpu":
        systems["beir"] = lambda: theirs(options, dataset, store, queries)
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    means: dict[str, dict[str, float]] = {}

    def keep(name: str, _: int, result: tuple[dict[str, float], dict[str, float]]) -> None:
        seconds, means[name] = result
        stages[name].append({**seconds, "total": seconds["search"] + seconds["metrics"]})

    times = time_alternately(systems, options.repeats, on_result=keep)
    if "beir" in means:
        for measure, value in means["beir"].items():
            # beir rounds to five digits.
            assert abs(means["ours"][measure] - value) < 5.1e-6, (measure, means["ours"][measure], value)
    else:
        run = run_of(options, dataset, store, queries)
        check_by_float64(options, store, queries, run)
        check_by_trec_eval(options, dataset, run, means["ours"])
    rows = []
    for name, (first, *rounds) in stages.items():
        medians = {f"{stage}_s": statistics.median(seconds[stage] for seconds in rounds) for stage in first}
        medians["processor_s"] = statistics.median(each.processor for each in times[name])
        values = {"what": name, "first_total_s": first["total"], "ndcg@10": means[name]["ndcg@10"]}
        rows.append({**values, **medians})
    if len(rows) == 2:
        ratios = (rows[1][column] / rows[0][column] for column in ("total_s", "processor_s"))
        print("beir takes {:.2f} times as long and {:.2f} times the processor time, with equal values".format(*ratios))
    return rows


def run_of(options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray) -> RankedRun:
    """The run that `retriever evaluate beir` computes after encoding."""
    ids = store.ids()
    return ranked_run(dataset, ids, exact_search(store, ids, device=options.device), lambda: queries, options.k)


def ours(
    options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each stage, and the mean metrics."""
    began = time.perf_counter()
    run = run_of(options, dataset, store, queries)
    searched = time.perf_counter()
    metrics: Metrics = score(dataset, run, options.k, KS)
    return {"search": searched - began, "metrics": time.perf_counter() - searched}, metrics.mean


class Embedded:
    """A model for the beir package whose embeddings are precomputed: passages by id, queries in order."""

    def __init__(self, vectors: np.ndarray, queries: np.ndarray) -> None:
        self._vectors, self._queries = torch.from_numpy(vectors), torch.from_numpy(queries)

    def encode_queries(self, queries: list[str], **options: Any) -> Any:
        return self._queries

    def encode_corpus(self, corpus: list[dict[str, str]], **options: Any) -> Any:
        return self._vectors[[int(passage["text"].rpartition(" ")[2]) for passage in corpus]]


def theirs(
    options: argparse.Namespace, dataset: BeirDataset, store: EmbeddingStore, queries: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The same with beir's exact search and evaluation. Its inputs are in memory before the clock starts."""
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
    """Check scores and passages of some queries against products in float64."""
    vectors, asked = (torch.from_numpy(some).to(options.device) for some in (store.vectors(), queries))
    check("ours", (run.scores, run.rows), best_in_float64(vectors, asked, options.k), options.k)


def check_by_trec_eval(
    options: argparse.Namespace, dataset: BeirDataset, run: RankedRun, mean: dict[str, float]
) -> None:
    """Check every mean against trec_eval's on the same run."""
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
    """Peak memory of every stage, without pages mapped from files."""
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
    """Context manager. Yields a list whose only entry becomes the largest anonymous memory of this process in bytes."""
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
    """Memory of this process that is not backed by files (Linux's RssAnon)."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table and update its rows in eval.csv."""
    columns = ("search_s", "metrics_s", "total_s", "processor_s", "first_total_s", "peak_mib", "ndcg@10")
    size = {name: str(getattr(options, name)) for name in ("device", "rows", "dim", "queries", "k", "threads")}
    # Spinning threads lose most of their time on shared cores, so the rows state the wait policy and the load.
    load = {"omp_wait": os.environ.get("OMP_WAIT_POLICY", ""), "load": f"{os.getloadavg()[0]:.1f}"}
    measured = machine(options.commit)
    found = []
    for row in rows:
        shown = (f"{name} {row[name]:.4f}" for name in columns if name in row)
        print(f"{row['what']:20}", "  ".join(shown))
        values = {name: f"{row[name]:.6g}" if name in row else "" for name in columns}
        found.append({"what": row["what"], **size, **load, **values, **measured})
    key = ("what", *size, "hardware")
    update_rows(found, options.results / "eval.csv", key)


if __name__ == "__main__":
    main()
