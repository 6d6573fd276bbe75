"""The ring benchmark derives the overlap of communication from profiled kernels; both benchmarks write their rows."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import LoadedPython, torchrun

from scripts import ROOT
from scripts.benchmarks.distributed import ring_plots

FOLDER = ROOT / "scripts/benchmarks/distributed"
RING, LARGEST_BATCH = FOLDER / "bench_ring.py", FOLDER / "bench_largest_batch.py"


def kernel(name: str, start: float, end: float) -> SimpleNamespace:
    """A kernel event as in the profiler; times in microseconds."""
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type="DeviceType.CUDA", time_range=times, is_user_annotation=False)


def test_hidden_share_counts_overlap_with_computation() -> None:
    spans = ring_plots.kernel_spans(
        [
            kernel("ncclDevKernel_SendRecv", 1000, 3000),
            kernel("tile_sums_kernel", 1500, 2000),
            kernel("nvjet_tst_128x256", 1800, 2500),
            kernel("ncclDevKernel_AllReduce_Max", 2600, 3500),
            SimpleNamespace(name="aten::mm", device_type="DeviceType.CPU"),
            SimpleNamespace(name="nccl:send 0->1", device_type="DeviceType.CUDA", is_user_annotation=True),
        ]
    )
    assert ring_plots.hidden_share(spans) == pytest.approx((0.5, 2.0, 2.5))


def test_spans_are_those_of_the_last_call() -> None:
    calls = [kernel("tile_sums_kernel", 1000, 2000), kernel("ncclDevKernel_SendRecv", 1500, 2500)]
    calls += [kernel("ncclDevKernel_SendRecv", 5500, 6000), kernel("tile_sums_kernel", 5000, 7000)]
    spans = ring_plots.kernel_spans(calls, 2)
    assert ring_plots.hidden_share(spans) == pytest.approx((1.0, 0.5, 2.0))


@pytest.mark.slow
def test_both_benchmarks_write_their_rows(python: LoadedPython, tmp_path: Path) -> None:
    for words in (torchrun(2, RING, "--samples=1"), [LARGEST_BATCH]):
        done = python.run(*words, "--device", "cpu", "--quick", "--results", tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "ring.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["status"] for row in rows} == {"measured"}
    assert len([row for row in rows if row["part"] == "ablation"]) == 7
    with (tmp_path / "largest_batch.csv").open(newline="") as stream:
        assert {row["status"] for row in csv.DictReader(stream)} == {"trained"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"ring.png", "largest_batch.png"}


@pytest.mark.slow
def test_measurements_beyond_the_budget_have_a_row(python: LoadedPython, tmp_path: Path) -> None:
    for words in (torchrun(2, RING), [LARGEST_BATCH]):
        done = python.run(*words, "--device=cpu", "--quick", "--budget=0", "--results", tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("ring.csv", "largest_batch.csv"):
        with (tmp_path / name).open(newline="") as stream:
            assert {row["status"] for row in csv.DictReader(stream)} == {"no time left"}
