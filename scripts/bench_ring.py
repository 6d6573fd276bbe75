"""The loss over ranks: its speed beside one GPU, the literature's losses beside it, and what its transfers cost.

torchrun --nproc-per-node 2 scripts/bench_ring.py
torchrun --nproc-per-node 2 scripts/bench_ring.py --device cpu --quick

Part "speed": one rank alone with the whole batch, then all ranks by the ring and by gathering. Part "ablation": memory
and time of each way at one size. Every way is checked against float64 first. Part "profile" (GPUs): how much of the
ring's transfers runs beside its tiles, with ring_profile.png. Rows go to ring.csv as they come and the ablation to
ring.png, in scripts/results or where --results says; what --budget seconds do not suffice for has a row that says so.
Embeddings are fp32, products bf16 by autocast, the loss symmetric.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine
from ring_plots import draw_ablation, draw_profile, hidden_share, kernel_spans

from index.files import atomic_path
from losses import disco_clip_loss, gathered_clip_loss, inf_cl_loss, local_rows_loss, ring_clip_loss

MIB = 2**20
# The order of the paper's table.
METHODS: dict[str, Callable[..., Tensor]] = {
    "whole matrix on every rank": gathered_clip_loss,
    "local rows (OpenCLIP)": local_rows_loss,
    "DisCo-CLIP": disco_clip_loss,
    "ring": ring_clip_loss,
    "ours: ring + tiles": partial(inf_cl_loss, symmetric=True, exchange="ring"),
    "ours: gathered + tiles": partial(inf_cl_loss, symmetric=True, exchange="gather"),
    "ours: auto": partial(inf_cl_loss, symmetric=True),
}
OURS = tuple(name for name in METHODS if name.startswith("ours"))
# A rank that waits so long for another waits in vain: one of them has run out of memory alone.
PATIENCE = datetime.timedelta(seconds=120)
ROW_SECONDS, FEWEST_SAMPLES = 4.0, 3


def main() -> None:
    """Measure what was asked for on every rank; the first one writes."""
    began = time.monotonic()
    options = arguments()
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", timeout=PATIENCE)
    bench = Bench(options, began + options.budget)
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

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.cuda = options.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.here = machine() | ({"commit": options.commit} if options.commit else {})
        self.rows: list[dict[str, str]] = []
        self.errors: dict[str, float] = {}
        self.profiled: dict[str, Any] = {}

    def pairs(self, pairs: int, whole: bool = False) -> list[Tensor]:
        """This rank's queries and passages and the logit_scale, or the whole batch's; one batch for all ranks."""
        generator = torch.Generator(self.device).manual_seed(0)
        shares = [pairs * r // self.size for r in range(self.size + 1)]
        leaves = []
        query, noise = (torch.randn(pairs, self.options.dim, generator=generator, device=self.device) for _ in range(2))
        for side in (query, query + noise):
            rows = side if whole else side[shares[self.rank] : shares[self.rank + 1]]
            leaves.append(torch.nn.functional.normalize(rows, dim=1).requires_grad_())
        return [*leaves, torch.tensor(50.0, device=self.device, requires_grad=True)]

    def step(self, method: Callable[..., Tensor], leaves: list[Tensor], **options: Any) -> list[Tensor]:
        """The loss and its gradients."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = method(leaves[0], leaves[1], logit_scale=leaves[2], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def checks(self) -> None:
        """Each method's largest relative error of loss and gradients against float64."""
        pairs = 256 if self.options.quick else 2048
        wide = [leaf.detach().double().requires_grad_() for leaf in self.pairs(pairs, whole=True)]
        truth = inf_cl_loss(*wide[:2], logit_scale=wide[2], symmetric=True, implementation="full")
        expected = [truth.detach(), *torch.autograd.grad(truth, wide)]
        own = slice(pairs * self.rank // self.size, pairs * (self.rank + 1) // self.size)
        for name, method in METHODS.items():
            loss, query, passage, scale = self.step(method, self.pairs(pairs), group=distributed.group.WORLD)
            scale = scale.clone()
            distributed.all_reduce(scale)
            found = [loss, query / self.size, passage / self.size, scale / self.size]
            parts = [expected[0], expected[1][own], expected[2][own], expected[3]]
            error = max(
                float((ours.double() - theirs).norm() / theirs.norm())
                for ours, theirs in zip(found, parts, strict=True)
            )
            self.errors[name] = self.most(error)
            if name in OURS and self.errors[name] > 0.02:
                raise SystemExit(f"{name}: off by {self.errors[name]:.1e}")

    def speed(self, pairs: int) -> None:
        """One rank alone beside all of them."""
        alone = self.measure("one rank alone", pairs, "speed")
        for name in OURS:
            self.measure(name, pairs, "speed", alone)

    def measure(self, name: str, pairs: int, part: str, alone: float | None = None) -> float | None:
        """A row: median milliseconds of the slowest rank, and the most memory that any has beside the embeddings."""
        single = name == "one rank alone"
        problem, found = "", None
        if self.no_time_left():
            problem = "no time left"
        elif single and self.rank:
            found = (0.0, 0.0)
        else:
            try:
                found = self.timed(name, pairs, single)
            except torch.OutOfMemoryError:
                problem = "out of memory"
        if self.cuda:
            torch.cuda.empty_cache()
        failed = self.most(float(bool(problem))) > 0
        milliseconds, extra = (self.most(value) for value in (found or (0.0, 0.0)))
        row = {
            "part": part,
            "method": name,
            "pairs": str(pairs),
            "dim": str(self.options.dim),
            "ranks": "1" if single else str(self.size),
            "milliseconds": "" if failed else f"{milliseconds:.4g}",
            "times_one_rank": f"{alone / milliseconds:.3f}" if alone and not failed else "",
            "extra_mib": "" if failed or not self.cuda else f"{extra:.1f}",
            "error": f"{self.errors[name]:.1e}" if name in self.errors else "",
            "status": (problem or "out of memory") if failed else "measured",
            **self.here,
        }
        self.rows.append(row)
        self.write()
        if not self.rank:
            print(
                f"{part:<9}{pairs:>8} {name:<28}{row['milliseconds'] or row['status']:>14} ms "
                f"{row['extra_mib']:>9} MiB  {row['times_one_rank']}",
                flush=True,
            )
        return None if failed else milliseconds

    def timed(self, name: str, pairs: int, single: bool) -> tuple[float, float]:
        """Milliseconds and MiB on this rank."""
        leaves = self.pairs(pairs, whole=single)
        method = partial(inf_cl_loss, symmetric=True) if single else METHODS[name]
        options = {} if single else {"group": distributed.group.WORLD}

        def sample() -> float:
            if not single:
                self.barrier()
            self.wait()
            began = time.perf_counter()
            self.step(method, leaves, **options)
            self.wait()
            return time.perf_counter() - began

        sample()
        if self.cuda:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = sample()
        seconds = seconds if single else self.most(seconds)
        samples = min(self.options.samples, max(FEWEST_SAMPLES, int(ROW_SECONDS / seconds)))
        median = statistics.median(sample() for _ in range(samples))
        extra = (torch.cuda.max_memory_allocated() - held) / MIB if self.cuda else 0.0
        return 1000 * median, extra

    def profile(self, pairs: int) -> None:
        """One step of the ring under the profiler: how much of its transfers lies beside other kernels."""
        from torch.profiler import ProfilerActivity, profile

        if self.no_time_left():
            return
        leaves, method = self.pairs(pairs), METHODS["ours: ring + tiles"]
        for _ in range(2):
            self.step(method, leaves, group=distributed.group.WORLD)
        # Else a transfer's time is that of waiting for a rank that begins later.
        self.barrier()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            self.step(method, leaves, group=distributed.group.WORLD)
            self.wait()
        spans = kernel_spans(recorded.events())
        hidden, transfers, total = hidden_share(spans)
        row = dict.fromkeys(self.rows[0], "") | {
            "part": "profile",
            "method": "ours: ring + tiles",
            "pairs": str(pairs),
            "dim": str(self.options.dim),
            "ranks": str(self.size),
            "milliseconds": f"{total:.4g}",
            "status": f"{hidden:.3f} of {transfers:.3g} ms of transfers beside other kernels",
            **self.here,
        }
        self.rows.append(row)
        self.profiled = {"spans": spans, "title": f"{pairs} pairs, {self.size} ranks: {row['status']}"}
        if not self.rank:
            print(row["status"], flush=True)

    def finish(self) -> None:
        """Table and plots."""
        self.write()
        if self.rank:
            return
        folder = self.options.results
        draw_ablation([row for row in self.rows if row["part"] == "ablation"], folder / "ring.png")
        if self.profiled:
            draw_profile(self.profiled["spans"], self.profiled["title"], folder / "ring_profile.png")

    def write(self) -> None:
        """The table so far."""
        if self.rank:
            return
        table = self.options.results / "ring.csv"
        with atomic_path(table) as path, path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, self.rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def no_time_left(self) -> bool:
        """Whether the budget is spent on any rank."""
        return self.most(time.monotonic() - self.deadline) > 0

    def barrier(self) -> None:
        distributed.barrier(device_ids=[self.device.index] if self.cuda else None)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def most(self, value: float) -> float:
        """Of all ranks."""
        shared = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return float(shared)


if __name__ == "__main__":
    main()
