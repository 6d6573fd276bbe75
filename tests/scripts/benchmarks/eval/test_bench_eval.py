"""bench_eval.py runs, updates its rows, and on a GPU machine needs only torch, numpy and pytrec_eval."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from eval.ranking import RankedRun
from index.beir import BeirDataset
from scripts import ROOT
from scripts.benchmarks.eval import bench_eval

SMALL = ["--rows", "523", "--queries", "31", "--dim", "16", "--repeats", "1"]
# Runs the code of --device cuda on a CPU, and refuses to import any other package.
ALONE = """
import importlib.abc, sys
import torch, numpy, pytrec_eval
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        head = name.partition(".")[0]
        ours = {"eval", "index", "scripts"}
        known = {"torch", "numpy"} | ours | sys.stdlib_module_names
        if head not in known and head not in {loaded.partition(".")[0] for loaded in sys.modules}:
            raise AssertionError(f"imports {name}")
sys.meta_path.insert(0, Refuse())
from scripts.benchmarks.eval import bench_eval
from pathlib import Path
options, folder = bench_eval.parse_arguments(), Path(sys.argv[-1])
data, queries = bench_eval.generate(options, folder)
dataset, store = bench_eval.BeirDataset.open(data), bench_eval.embed(options, data, folder / "store")
_, mean = bench_eval.ours(options, dataset, store, queries)
run = bench_eval.run_of(options, dataset, store, queries)
bench_eval.check_by_float64(options, store, queries, run)
bench_eval.check_by_trec_eval(options, dataset, run, mean)
bench_eval.write(options, [{"what": "ours", "total_s": 1.0}])
"""


def run(*words: str) -> None:
    """Run Python with these arguments on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_rows_of_speed_and_memory_are_written_and_updated(tmp_path: Path) -> None:
    for more in ([], ["--memory"], []):
        results = ["--results", str(tmp_path), "--commit", "abc1234", "--folder", str(tmp_path)]
        run(str(ROOT / "scripts/benchmarks/eval/bench_eval.py"), *SMALL, *results, *more)
    rows = rows_of(tmp_path)
    assert sorted(row["what"] for row in rows) == ["beir", "ours", "preflight", "search and metrics", "store"]
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert all(float(row["total_s"] if row["what"] in ("ours", "beir") else row["peak_mib"]) > 0 for row in rows)


def test_gpu_run_imports_only_torch_numpy_and_pytrec_eval(tmp_path: Path) -> None:
    run("-c", ALONE, *SMALL, "--results", str(tmp_path), "--folder", str(tmp_path))
    assert [row["what"] for row in rows_of(tmp_path)] == ["ours"]


def test_a_wrong_ranking_and_a_wrong_mean_are_refused(tmp_path: Path) -> None:
    options = Namespace(rows=523, queries=31, dim=16, k=10, device="cpu")
    data, queries = bench_eval.generate(options, tmp_path)
    dataset, store = BeirDataset.open(data), bench_eval.embed(options, data, tmp_path / "store")
    found = bench_eval.run_of(options, dataset, store, queries)
    _, mean = bench_eval.ours(options, dataset, store, queries)
    bench_eval.check_by_float64(options, store, queries, found)
    wrong = RankedRun(found.queries, found.passages, (found.rows + 1) % options.rows, found.scores)
    with pytest.raises(SystemExit, match=r"expected 99\.99% of the passages of float64"):
        bench_eval.check_by_float64(options, store, queries, wrong)
    bench_eval.check_by_trec_eval(options, dataset, found, mean)
    with pytest.raises(AssertionError):
        bench_eval.check_by_trec_eval(options, dataset, found, mean | {"ndcg@10": mean["ndcg@10"] + 1e-8})
