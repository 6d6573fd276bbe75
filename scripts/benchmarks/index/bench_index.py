"""FAISS indexes: memory and time by size, recall targets on new queries, and the overhead over plain faiss.

    python scripts/datasets/index_sets.py clustered-1m --out SETS               writes a set (or wordnet, …)
    python scripts/benchmarks/index/bench_index.py sizes --sets SETS [--only clustered-1m] [--factory IVF4096,SQ8]
    python scripts/benchmarks/index/bench_index.py computed                     estimates for larger sizes
    OMP_NUM_THREADS=1 python scripts/benchmarks/index/bench_index.py targets --sets SETS
    python scripts/benchmarks/index/bench_index.py overhead --sets SETS
    python scripts/benchmarks/index/bench_index.py plots                        also the README tables

Rows are written to scripts/results/index_*.csv, in place of earlier rows of the same set and factory. `sizes` includes
`computed`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))


import faiss
import numpy as np

from index.ann.build import Plan, build
from index.ann.edit import retune
from index.ann.factory import choose, make, memory
from index.ann.index import Index
from index.ann.tuning.recall import Target, Truth, find_truth, recall_of_each
from scripts import RESULTS
from scripts.benchmarks import result_rows
from scripts.benchmarks.index import index_overhead, index_plots, index_rates, index_targets
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import read_rows, update_rows
from scripts.benchmarks.tables import readme_tables
from scripts.datasets.index_sets import read_set

K = 10
TARGET = 0.95
SIZES = {
    "clustered-10k": ("Flat", "HNSW32"),
    "clustered-100k": ("Flat", "SQfp16", "SQ8", "PQ64x4fs", "PQ64x4fs,RFlat", "IVF1024,Flat", "IVF1024,SQ8", "HNSW32"),
    "wordnet": ("Flat", "SQ8", "IVF1024,Flat", "IVF1024,SQ8", "HNSW32", "PQ192x4fs,RFlat"),
    "clustered-1m": ("IVF4096,Flat", "IVF4096,PQ64x4fs,Refine(SQ8)", "IVF4096,SQ8", "IVF4096,PQ64x4fs"),
    "clustered-10m": ("IVF16384_HNSW32,SQ8",),
}
COMPUTED = (100_000_000, 1_000_000_000)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "computed", "targets", "overhead", "plots", "one-size"))
    parser.add_argument("--sets", type=Path, help="folder that scripts/datasets/index_sets.py has written")
    parser.add_argument("--only", help="measure only this set")
    parser.add_argument("--factory", help="measure only this factory string")
    options = parser.parse_args()
    if options.what == "sizes":
        sizes(options.sets, options.only, options.factory)
    elif options.what == "computed":
        write_rows("index_sizes.csv", computed_sizes(), ("set", "factory"))
    elif options.what == "one-size":
        print(json.dumps(one_size(options.sets / options.only, options.factory)))
    elif options.what == "targets":
        for row in index_targets.rows(options.sets, options.only):
            write_rows("index_targets.csv", [{**row, **measured_on()}], ("set", "factory", "tuned_on"))
    elif options.what == "overhead":
        for row in index_overhead.rows(options.sets, options.only, options.factory):
            write_rows("index_overhead.csv", [{**row, **measured_on()}], ("set", "factory"))
    else:
        index_plots.draw(RESULTS)
        readme_tables.main()


def sizes(sets: Path, only: str | None, factory: str | None) -> None:
    """Measure every set and factory, each in its own process, so that peak memory is separate; then the estimates."""
    for name, factories in SIZES.items():
        if only not in (None, name):
            continue
        for each in (factory,) if factory else factories:
            words = [sys.executable, __file__, "one-size", "--sets", str(sets), "--only", name, "--factory", each]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            write_rows("index_sizes.csv", [json.loads(done.stdout.splitlines()[-1])], ("set", "factory"))
    if only is None:
        write_rows("index_sizes.csv", computed_sizes(), ("set", "factory"))


def one_size(folder: Path, factory: str) -> dict[str, Any]:
    """Build the index of a set, tune it to the recall target on half of its queries, and measure the other half."""
    store, queries = read_set(folder)
    # Exact search of thousands of queries in 10 million vectors would take longer than everything else.
    half = 2_000 if store.rows < 5_000_000 else 500
    before = _peak_mib()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary) / "index"
        started = time.perf_counter()
        build(store, out, Plan(factory))
        built = time.perf_counter() - started
        peak = _peak_mib()

        started = time.perf_counter()
        tuning = retune(out, store, Target(TARGET, K, queries[:half]))
        tuned = time.perf_counter() - started
        index = Index.open(out)
        truth = find_truth(store, Target(TARGET, K, queries[half : 2 * half]), np.empty(0, np.int64))
        recall = other_recall(index, truth)
        size = sum(entry.bytes for name, entry in index.manifest.files.items() if name.startswith(("index", "lists")))
        del index
    return {
        "set": folder.name,
        "factory": factory,
        "kind": "measured",
        "rows": store.rows,
        "dim": store.dim,
        "index_mib": round(size / 2**20, 1),
        "bytes_per_vector": round(size / store.rows, 1),
        "build_s": round(built, 1),
        "peak_mib": round(peak),
        "import_mib": round(before),
        "tune_s": round(tuned, 1),
        "target": TARGET,
        "met": tuning.met,
        "settings": str(tuning.chosen.settings),
        "recall_other_queries": round(recall, 4),
        "core_us_per_query": round(tuning.chosen.core_microseconds or 0.0, 1),
        "us_per_query": round(tuning.chosen.microseconds, 1),
        "threads": tuning.threads,
        **measured_on(),
    }


def other_recall(index: Index, truth: Truth) -> float:
    """Mean recall of an open index on queries that it was not tuned on."""
    return float(recall_of_each(index.search_rows(truth.queries, truth.k)[1], truth).mean())


def computed_sizes() -> list[dict[str, Any]]:
    """Estimates for sizes that fit no machine here: memory by the formulas of `auto`, time by rates measured here.

    Recall is left out, because only tuning tells it.
    """
    found = []
    for dim in (128, 768):
        rates = index_rates.Rates(dim)
        for rows in COMPUTED:
            names = (choose(rows, dim), f"IVF65536_HNSW32,PQ{dim // 2}x4fs", f"IVF65536_HNSW32,PQ{dim // 8}")
            for factory in names:
                size = memory(factory, rows, dim)
                lists = make(factory, dim).nlist
                found.append(
                    {
                        "set": f"{rows:,} × {dim}",
                        "factory": factory,
                        "kind": "computed",
                        "rows": rows,
                        "dim": dim,
                        "index_mib": round(size / 2**20),
                        "bytes_per_vector": round(size / rows, 1),
                        "clustering_core_s": round(rates.clustering(lists)),
                        "adding_core_s": round(rates.adding(factory.partition(",")[2], rows)),
                        **measured_on(),
                    }
                )
    return found


def write_rows(name: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Update rows in a CSV file. Columns that no row fills any more are left out."""
    update_rows(rows, RESULTS / name, key)
    written = read_rows(RESULTS / name)
    filled = {column for row in written for column, value in row.items() if value}
    result_rows.write_rows([{k: v for k, v in row.items() if k in filled} for row in written], RESULTS / name)


def measured_on() -> dict[str, str]:
    """Hardware and versions."""
    return {**machine(), "faiss": faiss.__version__}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
