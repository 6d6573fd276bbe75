"""The loss over ranks: its speed beside one GPU, the literature's losses beside it, and what its transfers cost.

torchrun --nproc-per-node 2 scripts/bench_ring.py
torchrun --nproc-per-node 2 scripts/bench_ring.py --device cpu --quick

Part "speed": one rank alone with the whole batch, then all ranks by the ring and by gathering; on GPUs also behind
other work, as in training, and by replaying a CUDA graph, since small batches by themselves wait for their host. Part
"ablation": memory and time of each way at one size. Every way is checked against float64 first. Part "profile" (GPUs):
how much of the ring's transfers runs beside its tiles, with ring_profile.png. Rows go to ring.csv as they come and the
ablation to ring.png, in scripts/results or where --results says; what --budget seconds do not suffice for has a row
that says so. Embeddings are fp32, products bf16 by autocast, the loss symmetric.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine
from rank_clock import BEHIND, CALLS, GRAPH, METHODS, OURS, RankClock, joined
from result_rows import write_rows
from ring_plots import draw_ablation, draw_profile, hidden_share


def main() -> None:
    """Measure what was asked for on every rank; the first one writes."""
    began = time.monotonic()
    options = arguments()
    ranks = joined(options.device)
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
    """The command line; --quick fills in small sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs, of the speed-up")
    parser.add_argument("--ablation-size", type=int, help="pairs, of the comparison")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--samples", type=int, help="calls that the median is taken of, fewer of long ones")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no further row is begun")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", help="of the code, where there is no checkout to ask")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    small = {"sizes": [256], "ablation_size": 256, "dim": 32, "samples": 2}
    large = {"sizes": [16384, 131072], "ablation_size": 65536, "dim": 768, "samples": 15}
    for name, value in (small if options.quick else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Bench:
    """Rows in the making."""

    def __init__(self, options: argparse.Namespace, clock: RankClock) -> None:
        self.options, self.clock, self.ranks = options, clock, clock.ranks
        self.here = machine() | ({"commit": options.commit} if options.commit else {})
        self.rows: list[dict[str, str]] = []
        self.errors: dict[str, float] = {}
        self.profiled: dict[str, Any] = {}

    def checks(self) -> None:
        """Each method's largest relative error of loss and gradients against float64."""
        self.errors = self.clock.errors(256 if self.options.quick else 2048, METHODS)
        for name in OURS:
            if self.errors[name] > 0.02:
                raise SystemExit(f"{name}: off by {self.errors[name]:.1e}")

    def speed(self, pairs: int) -> None:
        """The first rank alone, each alone at once (the slowest of them), and all together; on GPUs once more in ways
        that leave out what the host takes."""
        for way in (CALLS, BEHIND, GRAPH) if self.clock.cuda else (CALLS,):
            alone = self.measure("one rank alone", pairs, "speed", way=way)
            self.measure("each rank alone", pairs, "speed", alone, way=way)
            for name in OURS:
                self.measure(name, pairs, "speed", alone, way=way)

    def measure(self, name: str, pairs: int, part: str, alone: float = 0.0, *, way: str = CALLS) -> float:
        """A row: median milliseconds of the slowest rank, and the most memory that any has beside the embeddings."""
        clock = self.clock
        team = {"one rank alone": clock.alone, "each rank alone": clock.each}.get(name, clock.everyone)
        found = clock.measure(METHODS.get(name, METHODS["ours: auto"]), pairs, team, way=way)
        failed = bool(found.problem)
        row = {
            "part": part,
            "method": f"{name}, {way}" if way else name,
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
        """One step of the ring under the profiler: how much of its transfers lies beside other kernels."""
        if self.clock.no_time_left():
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
        """Table and plots."""
        self.write()
        if not self.ranks.is_first:
            return
        folder = self.options.results
        draw_ablation([row for row in self.rows if row["part"] == "ablation"], folder / "ring.png")
        if self.profiled:
            draw_profile(self.profiled["spans"], self.profiled["title"], folder / "ring_profile.png")

    def write(self) -> None:
        """The table so far."""
        if self.ranks.is_first:
            write_rows(self.rows, self.options.results / "ring.csv")


if __name__ == "__main__":
    main()
