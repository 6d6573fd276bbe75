"""The distributed loss: its speed against one GPU, losses of the literature, and the cost of communication.

    torchrun --nproc-per-node 2 scripts/benchmarks/distributed/bench_ring.py
    torchrun --nproc-per-node 2 scripts/benchmarks/distributed/bench_ring.py --device cpu --quick

Part "speed": one rank alone with the whole batch, then all ranks with the ring exchange and with all-gather. On a GPU
also behind other work, as in training, and as replays of a CUDA graph, because small batches are limited by kernel
launches. Part "ablation": memory and time of every method at one size. Part "profile" (GPU): how much of the ring's
communication overlaps with computation.

Every method is checked against float64 first. Embeddings are fp32, products bf16 by autocast, the loss symmetric. Rows
are written to ring.csv as they are measured; the ablation is plotted in ring.png, the profile in ring_profile.png.
Measurements that do not fit into --budget get a row that says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import RESULTS
from scripts.benchmarks.distributed.rank_clock import (
    BACK_TO_BACK,
    BEHIND_WORK,
    CUDA_GRAPH,
    METHODS,
    OURS,
    RankClock,
    init_ranks,
)
from scripts.benchmarks.distributed.ring_plots import draw_ablation, draw_profile, hidden_share
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows


def main() -> None:
    """Measure on every rank; the first rank writes."""
    began = time.monotonic()
    options = arguments()
    ranks = init_ranks(options.device)
    bench = Bench(options, RankClock(ranks, options.device, options.dim, options.samples, began + options.budget))
    bench.checks()
    for size in options.sizes:
        bench.speed(size)
    for name in METHODS:
        bench.measure(name, options.ablation_size, "ablation")
    if options.device == "cuda":
        bench.profile(options.sizes[-1])
    bench.finish()
    distributed.destroy_process_group()


def arguments() -> argparse.Namespace:
    """Parse the command line. --quick sets small sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs of the part speed")
    parser.add_argument("--ablation-size", type=int, help="pairs of the part ablation")
    parser.add_argument("--dim", type=int, help="dimensions")
    parser.add_argument("--samples", type=int, help="samples per median; fewer for long calls")
    parser.add_argument(
        "--budget", type=float, default=150, help="seconds after which no measurement is started (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for the CSV file and the plots (default: %(default)s)"
    )
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    options = parser.parse_args()
    small = {"sizes": [256], "ablation_size": 256, "dim": 32, "samples": 2}
    large = {"sizes": [16384, 131072], "ablation_size": 65536, "dim": 768, "samples": 15}
    for name, value in (small if options.quick else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Bench:
    """Measures the parts and collects the rows."""

    def __init__(self, options: argparse.Namespace, clock: RankClock) -> None:
        self.options, self.clock, self.ranks = options, clock, clock.ranks
        self.here = machine(options.commit)
        self.rows: list[dict[str, str]] = []
        self.errors: dict[str, float] = {}
        self.profiled: dict[str, Any] = {}

    def checks(self) -> None:
        """Largest relative error of each method's loss and gradients against float64."""
        self.errors = self.clock.errors(256 if self.options.quick else 2048, METHODS)
        for name in OURS:
            if self.errors[name] > 0.02:
                raise SystemExit(f"{name}: expected a relative error of at most 0.02, found {self.errors[name]:.1e}")

    def speed(self, pairs: int) -> None:
        """One rank alone, each rank alone at the same time (the slowest counts), and all ranks together."""
        for mode in (BACK_TO_BACK, BEHIND_WORK, CUDA_GRAPH) if self.clock.cuda else (BACK_TO_BACK,):
            alone = self.measure("one rank alone", pairs, "speed", mode=mode)
            self.measure("each rank alone", pairs, "speed", alone, mode=mode)
            for name in OURS:
                self.measure(name, pairs, "speed", alone, mode=mode)

    def measure(self, name: str, pairs: int, part: str, alone: float = 0.0, *, mode: str = BACK_TO_BACK) -> float:
        """Add a row: median milliseconds of the slowest rank, and the largest memory beyond the embeddings."""
        clock = self.clock
        team = {"one rank alone": clock.alone, "each rank alone": clock.each}.get(name, clock.everyone)
        found = clock.measure(METHODS.get(name, METHODS["ours: auto"]), pairs, team, mode=mode)
        failed = bool(found.problem)
        row = {
            "part": part,
            "method": f"{name}, {mode}" if mode else name,
            "pairs": str(pairs),
            "dim": str(self.options.dim),
            "ranks": str(team.size),
            "milliseconds": "" if failed else f"{found.milliseconds:.4g}",
            "times_one_rank": f"{alone / found.milliseconds:.3f}" if alone and not failed else "",
            "extra_mib": "" if failed or not clock.cuda else f"{found.peak_mib - found.held_mib:.1f}",
            "error": f"{self.errors[name]:.1e}" if name in self.errors else "",
            "status": found.problem or "measured",
            **self.here,
        }
        self.rows.append(row)
        self.write()
        if self.ranks.is_first:
            print(
                f"{part:<9}{pairs:>8} {name:<28}{row['milliseconds'] or row['status']:>14} ms "
                f"{row['extra_mib']:>9} MiB  {row['times_one_rank']}",
                flush=True,
            )
        return found.milliseconds

    def profile(self, pairs: int) -> None:
        """Profile one step of the ring: how much of its communication overlaps with other kernels."""
        if self.clock.out_of_time():
            return
        spans = self.clock.spans(METHODS["ours: ring + tiles"], pairs, self.clock.everyone)
        if spans is None:
            return
        hidden, transfers, total = hidden_share(spans)
        row = dict.fromkeys(self.rows[0], "") | {
            "part": "profile",
            "method": "ours: ring + tiles",
            "pairs": str(pairs),
            "dim": str(self.options.dim),
            "ranks": str(self.ranks.world_size),
            "milliseconds": f"{total:.4g}",
            "status": f"{hidden:.3f} of {transfers:.3g} ms of transfers beside other kernels",
            **self.here,
        }
        self.rows.append(row)
        self.profiled = {"spans": spans, "title": f"{pairs} pairs, {self.ranks.world_size} ranks: {row['status']}"}
        print(row["status"], flush=True)

    def finish(self) -> None:
        """Write the table and the plots."""
        self.write()
        if not self.ranks.is_first:
            return
        folder = self.options.results
        draw_ablation([row for row in self.rows if row["part"] == "ablation"], folder / "ring.png")
        if self.profiled:
            draw_profile(self.profiled["spans"], self.profiled["title"], folder / "ring_profile.png")

    def write(self) -> None:
        """Write the rows so far."""
        if self.ranks.is_first:
            write_rows(self.rows, self.options.results / "ring.csv")


if __name__ == "__main__":
    main()
