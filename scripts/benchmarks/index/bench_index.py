"""Measure the indexes: what sizes cost, whether recall targets are kept, and what ours adds to plain faiss.

    python scripts/datasets/index_sets.py clustered-1m --out SETS  write a set (also wordnet, clustered-10m …)
    python scripts/benchmarks/index/bench_index.py sizes --sets SETS [--only clustered-1m] [--factory IVF4096,SQ8]
    python scripts/benchmarks/index/bench_index.py computed  what no machine here holds (with sizes as well)
    OMP_NUM_THREADS=1 python scripts/benchmarks/index/bench_index.py targets --sets SETS
    python scripts/benchmarks/index/bench_index.py overhead --sets SETS
    python scripts/benchmarks/index/bench_index.py plots  and the tables of index/README.md

Each writes its rows to scripts/results/index_*.csv, in place of earlier ones of the same set and factory.
"""

from __future__ import annotations

import argparse
import csv
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
from scripts import RESULTS, ROOT
from scripts.benchmarks.index import index_overhead, index_plots, index_rates, index_targets
from scripts.benchmarks.machine import machine
from scripts.benchmarks.tables import index_tables
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
    parser.add_argument("--sets", type=Path, help="folder that scripts/datasets/index_sets.py wrote")
    parser.add_argument("--only", help="one set")
    parser.add_argument("--factory", help="one factory")
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
        index_tables.fill(RESULTS, ROOT / "index" / "README.md")


def sizes(sets: Path, only: str | None, factory: str | None) -> None:
    """Every set and factory in a process of its own, whose peak of memory is then theirs; and the computed rows."""
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
    """Build the index of a set to the recall target on half of its queries, and measure it on the other half."""
    store, queries = read_set(folder)
    # Exact search of thousands in 10 million would take longer than all the rest.
    half = 2_000 if store.rows < 5_000_000 else 500
    before = _anonymous_mib()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary) / "index"
        started = time.perf_counter()
        build(store, out, Plan(factory))
        built = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

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
    """Mean recall of an opened index for queries that it was not tuned on."""
    return float(recall_of_each(index.search_rows(truth.queries, truth.k)[1], truth).mean())


def computed_sizes() -> list[dict[str, Any]]:
    """What no machine here holds: memory by the same sums that `auto` makes, and time by rates measured on this one.

    Recall would be a guess: it is what tuning finds.
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
    """Put `rows` into a CSV, in place of those with the same key; the others stay."""
    path = RESULTS / name
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as stream:
            old = list(csv.DictReader(stream))
    new = {tuple(str(row[column]) for column in key) for row in rows}
    kept = [row for row in old if tuple(row[column] for column in key) not in new]
    # What no row fills any more is left out: a measurement may have other columns than it had.
    columns = list(dict.fromkeys(column for row in (*rows, *kept) for column in row if row[column] not in ("", None)))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def measured_on() -> dict[str, str]:
    """Where and with what."""
    return {**machine(), "faiss": faiss.__version__}


def _anonymous_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
