"""The largest batch that one GPU can train on, for each loss, found with whole optimizer steps.

    python scripts/benchmarks/distributed/bench_largest_batch.py
    python scripts/benchmarks/distributed/bench_largest_batch.py --device cpu --quick

Two towers of the size of BERT-base with random weights, AdamW, bf16, and texts of --tokens tokens. The batch is doubled
until it runs out of memory; then the last gap is bisected --halvings times. Ours stops at --goal. Token ids stay on the
host and are copied to the GPU by micro-batch.

Rows are written to largest_batch.csv; memory by batch size is plotted in largest_batch.png. A step that would probably
end after --budget is not started and gets a row that says so.
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
    LiteratureLoss,
    Search,
    StepResult,
    TowerSteps,
    TrainingMethod,
    keep_all_graphs,
    keep_no_graphs,
    keep_planned_graphs,
)
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

METHODS = [
    TrainingMethod("ours", lambda: InfCLLoss(symmetric=True), keep_planned_graphs, linear_memory=True),
    TrainingMethod("no gradient cache, whole matrix", lambda: LiteratureLoss(clip_loss), keep_all_graphs),
    TrainingMethod("gradient cache, whole matrix", lambda: LiteratureLoss(clip_loss), keep_no_graphs),
    TrainingMethod(
        "ours, embeddings on the host",
        lambda: InfCLLoss(symmetric=True),
        keep_planned_graphs,
        offload=True,
        linear_memory=True,
    ),
]


def main() -> None:
    """Search the largest batch of every method."""
    began = time.monotonic()
    options = arguments()
    bench = Bench(options, began + options.budget)
    for method in METHODS:
        if not options.methods or any(part in method.name for part in options.methods):
            bench.search(method)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per text (default: %(default)s)")
    parser.add_argument("--goal", type=int, default=2**20, help="pairs at which ours stops (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", help="only methods whose name contains one of these")
    parser.add_argument(
        "--halvings",
        type=int,
        default=2,
        help="bisection steps after running out of memory (default: %(default)s)",
    )
    parser.add_argument("--budget", type=float, default=240, help="time limit in seconds (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for the CSV file and the plot (default: %(default)s)"
    )
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches, to test the script")
    return parser.parse_args()


class Bench:
    """Searches the largest batches and collects the rows."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.goal = 256 if options.quick else options.goal
        self.here = machine(options.commit)
        self.rows: list[dict[str, Any]] = []
        self.steps = TowerSteps(
            "bert-tiny" if options.quick else "bert-base", options.tokens, torch.device(options.device)
        )

    def search(self, method: TrainingMethod) -> None:
        """Find the largest batch that fits; adds a row for every attempt."""
        search = Search(
            self.steps,
            method,
            first=64 if self.options.quick else 4096,
            goal=self.goal,
            factor=16 if method.linear_memory else 2,
            halvings=self.options.halvings,
            late=lambda seconds: time.monotonic() + seconds > self.deadline,
            report=self.add_row,
        )
        while search.try_next():
            pass
        beyond = ", then out of time"
        if search.fails:
            beyond = f", out of memory at {search.fails:,}"
        elif search.fits == self.goal:
            beyond = " (the goal)"
        print(f"{method.name}: {search.fits:,} pairs{beyond}", flush=True)

    def add_row(self, method: TrainingMethod, pairs: int, result: StepResult) -> None:
        """Add the row of an attempt."""
        row = {
            "method": method.name,
            "pairs": pairs,
            "tokens": self.options.tokens,
            "parameters": self.steps.parameters,
            "seconds": "" if result.problem else f"{result.seconds:.4g}",
            "peak_mib": "" if result.problem else f"{result.peak_mib:.0f}",
            "loss": "" if result.problem else f"{result.loss:.5g}",
            "status": result.problem or "trained",
            **self.here,
        }
        self.rows.append(row)
        write_rows(self.rows, self.options.results / "largest_batch.csv")
        draw(self.rows, self.options.results / "largest_batch.png")
        print(
            f"{method.name:<34}{pairs:>10,} pairs  {row['seconds'] or row['status']:>14} s {row['peak_mib']:>8} MiB",
            flush=True,
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the peak memory of the steps that fit, and a cross for each that did not."""
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
