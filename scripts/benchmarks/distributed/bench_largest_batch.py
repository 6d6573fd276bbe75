"""The largest batch that one GPU trains on, by each way of computing the loss, found by trying whole optimizer steps.

python scripts/benchmarks/distributed/bench_largest_batch.py
python scripts/benchmarks/distributed/bench_largest_batch.py --device cpu --quick

Two towers of BERT-base's size with random weights, AdamW, bf16; texts of --tokens tokens. A batch is doubled until it
runs out of memory, then the last gap is halved --halvings times; ours stops at --goal. Token ids wait on the host and
micro-batches of them visit the GPU. Rows go to largest_batch.csv, memory against the batch to largest_batch.png, in
scripts/results or where --results says. A step that would probably end after --budget seconds is not begun, and has a
row that says so; the ways are tried in the order of what their figures are worth.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from losses import InfCLLoss, clip_loss
from scripts import RESULTS
from scripts.benchmarks.distributed.tower_steps import (
    Attempt,
    Baseline,
    Search,
    TowerSteps,
    Way,
    all_kept,
    as_planned,
    none_kept,
)
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

WAYS = [
    Way("ours", lambda: InfCLLoss(symmetric=True), as_planned, endless=True),
    Way("no gradient cache, whole matrix", lambda: Baseline(clip_loss), all_kept),
    Way("gradient cache, whole matrix", lambda: Baseline(clip_loss), none_kept),
    Way(
        "ours, embeddings on the host",
        lambda: InfCLLoss(symmetric=True),
        as_planned,
        on_host=True,
        endless=True,
    ),
]


def main() -> None:
    """Try every way."""
    began = time.monotonic()
    options = arguments()
    bench = Bench(options, began + options.budget)
    for way in WAYS:
        if not options.ways or any(part in way.name for part in options.ways):
            bench.search(way)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--goal", type=int, default=2**20, help="pairs at which ours stops")
    parser.add_argument("--ways", nargs="*", help="those with one of these in their name")
    parser.add_argument("--halvings", type=int, default=2, help="of the gap between what fits and what does not")
    parser.add_argument("--budget", type=float, default=240, help="seconds in all; what is left then is left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches, to see that everything runs")
    return parser.parse_args()


class Bench:
    """Rows in the making."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.goal = 256 if options.quick else options.goal
        self.here = machine() | ({"commit": options.commit} if options.commit else {})
        self.rows: list[dict[str, Any]] = []
        self.steps = TowerSteps(
            "bert-tiny" if options.quick else "bert-base", options.tokens, torch.device(options.device)
        )

    def search(self, way: Way) -> None:
        """The most pairs that fit; a row for each that was tried."""
        search = Search(
            self.steps,
            way,
            first=64 if self.options.quick else 4096,
            goal=self.goal,
            factor=16 if way.endless else 2,
            halvings=self.options.halvings,
            late=lambda seconds: time.monotonic() + seconds > self.deadline,
            report=self.add_row,
        )
        while search.one_more():
            pass
        beyond = ", no time for more"
        if search.fails:
            beyond = f", not {search.fails:,}"
        elif search.fits == self.goal:
            beyond = ": the goal"
        print(f"{way.name}: {search.fits:,} pairs{beyond}", flush=True)

    def add_row(self, way: Way, pairs: int, made: Attempt) -> None:
        """A row of a step that was made, or could not be, with the memory that it took."""
        row = {
            "method": way.name,
            "pairs": pairs,
            "tokens": self.options.tokens,
            "parameters": self.steps.parameters,
            "seconds": "" if made.problem else f"{made.seconds:.4g}",
            "peak_mib": "" if made.problem else f"{made.peak_mib:.0f}",
            "loss": "" if made.problem else f"{made.loss:.5g}",
            "status": made.problem or "trained",
            **self.here,
        }
        self.rows.append(row)
        write_rows(self.rows, self.options.results / "largest_batch.csv")
        draw(self.rows, self.options.results / "largest_batch.png")
        print(
            f"{way.name:<34}{pairs:>10,} pairs  {row['seconds'] or row['status']:>14} s {row['peak_mib']:>8} MiB",
            flush=True,
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory of the steps that fitted, a cross where one did not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="pairs in the batch", ylabel="peak memory of a step, GiB")
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        fitted = sorted(
            (row["pairs"], float(row["peak_mib"]) / 1024) for row in rows if row["method"] == name and row["loss"]
        )
        failed = [row["pairs"] for row in rows if row["method"] == name and row["status"] == "out of memory"]
        if fitted:
            axes.plot(*zip(*fitted, strict=True), "o-", color=f"C{number}", label=name)
        axes.plot(failed, [0] * len(failed), "x", color=f"C{number}", clip_on=False)
    axes.set_title(
        f"{rows[0]['hardware']}, {rows[0]['parameters'] / 1e6:.0f} M parameters (x: out of memory)", fontsize=9
    )
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
