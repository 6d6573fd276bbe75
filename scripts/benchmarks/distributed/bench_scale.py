"""The tables of the Inf-CL paper on the GPUs of one machine: memory of the loss, largest batch, and speed.

    torchrun --nproc-per-node gpu scripts/benchmarks/distributed/bench_scale.py --budget 540
    torchrun --nproc-per-node 2 scripts/benchmarks/distributed/bench_scale.py --device cpu --quick

Part "loss": memory and time of every loss at growing batches over all ranks, until it runs out of memory. Part
"scaling": our loss on 1, 2, 4, … of the ranks with the same batch, and the share of the ring's communication that does
not overlap with computation. Part "step": whole optimizer steps of two BERT-base towers, and of ViT-L/14 with a text
tower; all methods alternate at growing batches until memory or time runs out. Losses are checked against float64 first.

Rows are written to scale.csv as they are measured, plots to scale_memory.png and scale_speed.png;
tables/launch_tables.py writes the tables of docs/design/distributed.md. Measurements that do not fit into --budget get
a row that says so; run the rest with --parts, --towers, --methods and --keep-rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from losses import InfCLLoss
from retriever.distributed.ranks import Ranks
from scripts import RESULTS
from scripts.benchmarks.distributed.rank_clock import METHODS, Measured, RankClock, init_ranks
from scripts.benchmarks.distributed.ring_plots import hidden_share
from scripts.benchmarks.distributed.scale_plots import draw
from scripts.benchmarks.distributed.tower_steps import (
    LiteratureLoss,
    Search,
    StepResult,
    TowerSteps,
    TrainingMethod,
    keep_no_graphs,
    keep_planned_graphs,
)
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import read_rows, write_rows
from scripts.benchmarks.timing import release_memory

OFFLOAD = "ours, embeddings on the host"
LITERATURE = [name for name in METHODS if not name.startswith("ours")]
# Share of --budget for the parts before the steps.
LOSS_SHARE = 0.45


def main() -> None:
    """Measure every part for which there is time; the first rank writes after each row."""
    began = time.monotonic()
    options = arguments()
    ranks = init_ranks(options.device)
    bench = Bench(options, ranks, began)
    bench.check()
    if "loss" in options.parts:
        bench.losses()
    if "scaling" in options.parts:
        bench.scaling()
    if "step" in options.parts:
        for number, towers in enumerate(options.towers):
            bench.steps(towers, 1 / (len(options.towers) - number))
    bench.finish()
    distributed.destroy_process_group()


def arguments() -> argparse.Namespace:
    """Parse the command line. --quick sets small sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["loss", "scaling", "step"],
        default=["loss", "scaling", "step"],
        help="parts to measure (default: %(default)s)",
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs of the part loss")
    parser.add_argument("--scaling-sizes", type=int, nargs="+", help="pairs of the part scaling")
    parser.add_argument("--step-sizes", type=int, nargs=2, help="smallest and largest number of pairs of the part step")
    parser.add_argument("--towers", nargs="+", help="bert-base, or an image tower such as ViT-L/14")
    parser.add_argument(
        "--methods", nargs="+", help="measure whole steps only of methods whose name contains one of these"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens per text of BERT-base (default: %(default)s)")
    parser.add_argument("--dim", type=int, help="dimensions")
    parser.add_argument("--samples", type=int, help="samples per median; fewer for long calls")
    parser.add_argument(
        "--halvings",
        type=int,
        default=1,
        help="bisection steps after running out of memory (default: %(default)s)",
    )
    parser.add_argument("--budget", type=float, default=540, help="time limit in seconds (default: %(default)s)")
    parser.add_argument(
        "--keep-rows", action="store_true", help="keep the rows of scale.csv that this run does not measure"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for the CSV file and the plots (default: %(default)s)"
    )
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    options = parser.parse_args()
    small: dict[str, Any] = {"sizes": [64, 128], "scaling_sizes": [128], "step_sizes": [32, 64]}
    small |= {"towers": ["bert-tiny", "tiny"], "dim": 32, "samples": 2}
    large: dict[str, Any] = {"sizes": [2**power for power in (15, 16, 17, 18, 20)], "scaling_sizes": [65536, 262144]}
    large |= {"step_sizes": [32768, 2**22], "towers": ["bert-base", "ViT-L/14"], "dim": 768, "samples": 7}
    for name, value in (small if options.quick else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Bench:
    """Measures the parts and collects the rows."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, began: float) -> None:
        self.options, self.ranks = options, ranks
        self.deadline = began + options.budget
        first_parts = options.budget * (LOSS_SHARE if "step" in options.parts else 1)
        self.clock = RankClock(ranks, options.device, options.dim, options.samples, began + first_parts)
        self.here = machine(options.commit)
        self.rows: list[dict[str, str]] = []
        table = options.results / "scale.csv"
        if options.keep_rows and table.exists():
            self.rows = [row for row in read_rows(table) if not self.asked(row)]

    def asked(self, row: dict[str, str]) -> bool:
        """Whether this run measures the row again."""
        if row["part"] != "step":
            return row["part"] in self.options.parts
        return "step" in self.options.parts and row["towers"] in self.options.towers and self.wanted(row["method"])

    def wanted(self, method: str) -> bool:
        """Whether --methods selects this method for whole steps."""
        return not self.options.methods or any(part in method for part in self.options.methods)

    def check(self) -> None:
        """Exit if our loss is not exact."""
        errors = self.clock.errors(128 if self.options.quick else 2048, {"ours": METHODS["ours: auto"]})
        if errors["ours"] > 0.02:
            raise SystemExit(f"ours: expected a relative error of at most 0.02, found {errors['ours']:.1e}")

    def losses(self) -> None:
        """Memory and time of every loss."""
        methods = {name: METHODS[name] for name in LITERATURE}
        ours = METHODS["ours: auto"]
        # Ours first, in case time runs out.
        for name, method in {"ours": ours, OFFLOAD: ours, **methods}.items():
            spent = ""
            for size in self.options.sizes:
                found = Measured(problem=spent)
                if spent != "out of memory":
                    found = self.clock.measure(method, size, self.clock.everyone, from_host=name == OFFLOAD)
                spent = found.problem
                self.add_loss("loss", name, size, self.ranks.world_size, found)

    def scaling(self) -> None:
        """Our loss on some of the ranks, with the same batch."""
        teams = [self.clock.team(size) for size in team_sizes(self.ranks.world_size)]
        for size in self.options.scaling_sizes:
            alone = 0.0
            for team in teams:
                found = self.clock.measure(METHODS["ours: auto"], size, team)
                alone = alone or found.milliseconds
                efficiency = alone / (team.size * found.milliseconds) if alone and found.milliseconds else 0.0
                more = {"efficiency": f"{efficiency:.3f}" if efficiency else ""}
                if self.clock.cuda and team.size > 1 and not self.clock.out_of_time():
                    spans = self.clock.spans(METHODS["ours: ring + tiles"], size, team)
                    if spans is not None:
                        hidden, transfers, total = hidden_share(spans)
                        more |= {"transfer_ms": f"{transfers:.4g}", "not_hidden": f"{1 - hidden:.3f}"}
                        more |= {"not_hidden_of_step": f"{(1 - hidden) * transfers / total:.4f}"}
                self.add_loss("scaling", "ours", size, team.size, found, **more)

    def steps(self, towers: str, share: float) -> None:
        """Whole steps of every method, size by size, in a share of the remaining time."""
        until = time.monotonic() + share * (self.deadline - time.monotonic())
        group = self.clock.everyone.group
        ours = partial(InfCLLoss, symmetric=True, group=group)
        methods = [
            TrainingMethod("ours", ours, keep_planned_graphs),
            TrainingMethod(OFFLOAD, ours, keep_planned_graphs, offload=True),
        ]
        methods += [
            TrainingMethod(name, partial(LiteratureLoss, METHODS[name], group), keep_no_graphs) for name in LITERATURE
        ]
        methods = [method for method in methods if self.wanted(method.name)]
        first, goal = self.options.step_sizes

        def report(method: TrainingMethod, pairs: int, result: StepResult) -> None:
            figures = {} if result.problem else self.step_figures(pairs, result)
            self.add("step", method.name, pairs, self.ranks.world_size, result.problem, towers=towers, **figures)

        if self.late(0.0):
            for method in methods:
                report(method, first, StepResult("no time left"))
            return
        steps = TowerSteps(towers, self.options.tokens, self.clock.device, self.ranks)
        searches = [
            Search(
                steps, method, first=first, goal=goal, factor=2, halvings=self.options.halvings,
                late=lambda seconds: self.late(seconds, until), report=report,
            )
            for method in methods
        ]  # fmt: skip
        # The methods alternate, so that all have reached the same sizes when time runs out.
        while searches:
            searches = [search for search in searches if search.try_next()]
        del steps
        release_memory()

    def step_figures(self, pairs: int, result: StepResult) -> dict[str, str]:
        """The columns of a successful step."""
        peak = f"{result.peak_mib:.0f}" if self.clock.cuda else ""
        rate = f"{pairs / result.seconds:.0f}"
        return {"milliseconds": f"{1000 * result.seconds:.5g}", "peak_mib": peak, "pairs_per_second": rate}

    def late(self, seconds: float, until: float | None = None) -> bool:
        """Whether work of `seconds` would end after `until` or the budget, on the clock of any rank."""
        return self.ranks.any(time.monotonic() + seconds > (until or self.deadline))

    def add_loss(self, part: str, method: str, pairs: int, ranks: int, found: Measured, **more: str) -> None:
        """Add a row of a loss."""
        figures = {}
        if not found.problem:
            figures = {"milliseconds": f"{found.milliseconds:.4g}"}
            if self.clock.cuda:
                figures |= {"held_mib": f"{found.held_mib:.1f}", "peak_mib": f"{found.peak_mib:.1f}"}
        self.add(part, method, pairs, ranks, found.problem, **figures, **more)

    def add(self, part: str, method: str, pairs: int, ranks: int, problem: str, towers: str = "", **more: str) -> None:
        """Add a row, print it and write the table."""
        columns = (
            "milliseconds", "held_mib", "peak_mib", "pairs_per_second", "efficiency", "transfer_ms", "not_hidden",
            "not_hidden_of_step",
        )  # fmt: skip
        row = {
            "part": part,
            "towers": towers,
            "method": method,
            "pairs": str(pairs),
            "dim": "" if towers else str(self.options.dim),
            "ranks": str(ranks),
            **{name: more.get(name, "") for name in columns},
            "status": problem or "measured",
            **self.here,
        }
        self.rows.append(row)
        if self.ranks.is_first:
            shown = "  ".join(f"{name} {row[name]}" for name in columns if row[name]) or problem
            print(f"{part:<8}{towers:<10}{method:<30}{pairs:>10,} pairs by {ranks}  {shown}", flush=True)
            write_rows(self.rows, self.options.results / "scale.csv")

    def finish(self) -> None:
        """Draw the plots."""
        if self.ranks.is_first:
            draw(self.rows, self.options.results)


def team_sizes(ranks: int) -> list[int]:
    """1, 2, 4, … and the number of ranks."""
    return sorted({*(2**power for power in range(ranks.bit_length()) if 2**power < ranks), ranks})


if __name__ == "__main__":
    main()
