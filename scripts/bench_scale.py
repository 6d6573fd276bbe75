"""The method's tables at the scale of a node: memory of the loss, largest batch, speed; on any number of GPUs.

torchrun --nproc-per-node gpu scripts/bench_scale.py --budget 540
torchrun --nproc-per-node 2 scripts/bench_scale.py --device cpu --quick

Part "loss": memory and time of each loss at growing batches, over all ranks, until it runs out of memory. Part
"scaling": ours by 1, 2, 4 … of the ranks on the same batch, and how much of the ring's transfers no other kernel hides.
Part "step": whole optimizer steps of two BERT-base and of ViT-L/14 beside a text tower, all ways in turns at growing
batches until memory or time is spent: seconds (of short ones the second), samples a second, peak memory, the largest
batch. Losses are checked against float64 first.

Rows go to scale.csv as they come, plots to scale_memory.png and scale_speed.png, in scripts/results or where --results
says; `python scripts/launch_tables.py` writes the tables of scripts/launch/README.md from them. What --budget seconds
do not suffice for has a row that says so; with --parts, --towers, --ways and --keep-rows another call measures
the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine
from rank_clock import METHODS, Measured, RankClock, joined
from result_rows import read_rows, write_rows
from ring_plots import hidden_share
from scale_plots import draw
from tower_steps import Attempt, Baseline, Search, TowerSteps, Way, as_planned, none_kept

from losses import InfCLLoss
from retriever.distributed.ranks import Ranks

OFFLOAD = "ours, embeddings on the host"
LITERATURE = [name for name in METHODS if not name.startswith("ours")]
# Of --budget, until when the parts before the steps may go on.
LOSS_SHARE = 0.45


def main() -> None:
    """Measure every part for which there is time; the first rank writes after each row."""
    began = time.monotonic()
    options = arguments()
    ranks = joined(options.device)
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
    """The command line; --quick fills in small sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=["loss", "scaling", "step"], default=["loss", "scaling", "step"])
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs of the memory table")
    parser.add_argument("--scaling-sizes", type=int, nargs="+", help="pairs that 1, 2, 4 … ranks share")
    parser.add_argument("--step-sizes", type=int, nargs=2, help="pairs of the first step and of the largest")
    parser.add_argument("--towers", nargs="+", help="bert-base, or a vision tower such as ViT-L/14")
    parser.add_argument("--ways", nargs="+", help="of whole steps, those with one of these in their name")
    parser.add_argument("--tokens", type=int, default=16, help="of each text of BERT-base")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--samples", type=int, help="calls that the median is taken of, fewer of long ones")
    parser.add_argument("--halvings", type=int, default=1, help="of the gap between what fits and what does not")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all; what is left then is left out")
    parser.add_argument(
        "--keep-rows", action="store_true", help="keep those of parts and towers that are not asked for"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", help="of the code, where there is no checkout to ask")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
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
    """Rows in the making."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, began: float) -> None:
        self.options, self.ranks = options, ranks
        self.deadline = began + options.budget
        first_parts = options.budget * (LOSS_SHARE if "step" in options.parts else 1)
        self.clock = RankClock(ranks, options.device, options.dim, options.samples, began + first_parts)
        self.here = machine() | ({"commit": options.commit} if options.commit else {})
        self.rows: list[dict[str, str]] = []
        table = options.results / "scale.csv"
        if options.keep_rows and table.exists():
            self.rows = [row for row in read_rows(table) if not self.asked(row)]

    def asked(self, row: dict[str, str]) -> bool:
        """Whether this call measures such a row anew."""
        if row["part"] != "step":
            return row["part"] in self.options.parts
        return "step" in self.options.parts and row["towers"] in self.options.towers and self.wanted(row["method"])

    def wanted(self, way: str) -> bool:
        """Whether whole steps by this way are asked for."""
        return not self.options.ways or any(part in way for part in self.options.ways)

    def check(self) -> None:
        """Ours is refused if it is not exact."""
        errors = self.clock.errors(128 if self.options.quick else 2048, {"ours": METHODS["ours: auto"]})
        if errors["ours"] > 0.02:
            raise SystemExit(f"ours: off by {errors['ours']:.1e}")

    def losses(self) -> None:
        """Memory and time of each loss."""
        methods = {name: METHODS[name] for name in LITERATURE}
        ours = METHODS["ours: auto"]
        # Ours first: its figures are worth most.
        for name, method in {"ours": ours, OFFLOAD: ours, **methods}.items():
            spent = ""
            for size in self.options.sizes:
                found = Measured(problem=spent)
                if spent != "out of memory":
                    found = self.clock.measure(method, size, self.clock.everyone, from_host=name == OFFLOAD)
                spent = found.problem
                self.add_loss("loss", name, size, self.ranks.world_size, found)

    def scaling(self) -> None:
        """Ours by some of the ranks on the batch of all."""
        teams = [self.clock.team(size) for size in team_sizes(self.ranks.world_size)]
        for size in self.options.scaling_sizes:
            alone = 0.0
            for team in teams:
                found = self.clock.measure(METHODS["ours: auto"], size, team)
                alone = alone or found.milliseconds
                of_perfect = alone / (team.size * found.milliseconds) if alone and found.milliseconds else 0.0
                more = {"efficiency": f"{of_perfect:.3f}" if of_perfect else ""}
                if self.clock.cuda and team.size > 1 and not self.clock.no_time_left():
                    spans = self.clock.spans(METHODS["ours: ring + tiles"], size, team)
                    if spans is not None:
                        hidden, transfers, total = hidden_share(spans)
                        more |= {"transfer_ms": f"{transfers:.4g}", "not_hidden": f"{1 - hidden:.3f}"}
                        more |= {"not_hidden_of_step": f"{(1 - hidden) * transfers / total:.4f}"}
                self.add_loss("scaling", "ours", size, team.size, found, **more)

    def steps(self, towers: str, share: float) -> None:
        """Whole steps by every way, size by size, in a share of the time that is left."""
        until = time.monotonic() + share * (self.deadline - time.monotonic())
        group = self.clock.everyone.group
        ours = partial(InfCLLoss, symmetric=True, group=group)
        ways = [Way("ours", ours, as_planned), Way(OFFLOAD, ours, as_planned, on_host=True)]
        ways += [Way(name, partial(Baseline, METHODS[name], group), none_kept) for name in LITERATURE]
        ways = [way for way in ways if self.wanted(way.name)]
        first, goal = self.options.step_sizes

        def report(way: Way, pairs: int, made: Attempt) -> None:
            figures = {} if made.problem else self.step_figures(pairs, made)
            self.add("step", way.name, pairs, self.ranks.world_size, made.problem, towers=towers, **figures)

        if self.late(0.0):
            for way in ways:
                report(way, first, Attempt("no time left"))
            return
        steps = TowerSteps(towers, self.options.tokens, self.clock.device, self.ranks)
        searches = [
            Search(
                steps, way, first=first, goal=goal, factor=2, halvings=self.options.halvings,
                late=lambda seconds: self.late(seconds, until), report=report,
            )
            for way in ways
        ]  # fmt: skip
        # In turns: when time is spent, every way has the sizes that were reached.
        while searches:
            searches = [search for search in searches if search.one_more()]
        del steps
        self.clock.release()

    def step_figures(self, pairs: int, made: Attempt) -> dict[str, str]:
        """Columns of a step that was made."""
        peak = f"{made.peak_mib:.0f}" if self.clock.cuda else ""
        rate = f"{pairs / made.seconds:.0f}"
        return {"milliseconds": f"{1000 * made.seconds:.5g}", "peak_mib": peak, "pairs_per_second": rate}

    def late(self, seconds: float, until: float | None = None) -> bool:
        """Whether something of so many seconds would end after that, or the budget, by the clock of any rank."""
        return self.ranks.any(time.monotonic() + seconds > (until or self.deadline))

    def add_loss(self, part: str, method: str, pairs: int, ranks: int, found: Measured, **more: str) -> None:
        """A row of a loss."""
        figures = {}
        if not found.problem:
            figures = {"milliseconds": f"{found.milliseconds:.4g}"}
            if self.clock.cuda:
                figures |= {"held_mib": f"{found.held_mib:.1f}", "peak_mib": f"{found.peak_mib:.1f}"}
        self.add(part, method, pairs, ranks, found.problem, **figures, **more)

    def add(self, part: str, method: str, pairs: int, ranks: int, problem: str, towers: str = "", **more: str) -> None:
        """A row, printed and written."""
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
        """The plots."""
        if self.ranks.is_first:
            draw(self.rows, self.options.results)


def team_sizes(ranks: int) -> list[int]:
    """1, 2, 4 … and all."""
    return sorted({*(2**power for power in range(ranks.bit_length()) if 2**power < ranks), ranks})


if __name__ == "__main__":
    main()
