"""Time and memory of the loss with negatives outside the pool, forward and backward, beside the plain loss.

    python scripts/benchmarks/losses/bench_negatives.py --device cuda
    python scripts/benchmarks/losses/bench_negatives.py --device cpu --quick

The first writes loss_negatives.csv in scripts/results, in less than 5 minutes. Loss and gradients of every case are
first compared with float64 at --check-size; the script exits with 1 after writing if one is not exact enough.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from losses import Negatives, Ragged, inf_cl_loss
from scripts import RESULTS
from scripts.benchmarks.losses.loss_clock import MIB, Clock, best_product
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
SAMPLES = 15


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    part: str
    symmetric: bool
    own: bool = False
    same_side: bool = False
    frozen: str = ""


CASES = [
    Case("plain", "pairs", True),
    Case("own", "pairs", True, own=True),
    Case("same_side", "pairs", True, same_side=True),
    Case("plain, one direction", "pairs", False),
    Case("own, one direction", "pairs", False, own=True),
    Case("same_side, one direction", "pairs", False, same_side=True),
    Case("plain", "frozen", False),
    Case("frozen on the device", "frozen", False, frozen="device"),
    Case("frozen in pinned host memory", "frozen", False, frozen="pinned"),
]


def main() -> None:
    """Check, measure, write."""
    options = parse_arguments()
    clock, here = Clock(options.device, 1.0), machine()
    rows: list[dict[str, Any]] = []
    faults = [fault for dtype in TOLERANCE for fault in check(options, dtype)]
    size = 8192 if options.device == "cuda" and not options.quick else 256
    product = 2 * size**3 / best_product(clock, size) / 1e9
    base: dict[tuple[str, bool], float] = {}
    for part in ("pairs", "frozen"):
        inputs = Inputs.of(options, part)
        for case in (case for case in CASES if case.part == part):
            outcome = measure(clock, inputs, case, options)
            base.setdefault((part, case.symmetric), outcome["milliseconds"])
            ratio = outcome["milliseconds"] / base[part, case.symmetric]
            row = {
                "part": part,
                "case": case.name,
                "queries": len(inputs.query),
                "dim": options.dim,
                "own": len(inputs.own.values) if case.own else 0,
                "frozen": len(inputs.frozen) if case.frozen else 0,
                "milliseconds": f"{outcome['milliseconds']:.4g}",
                "samples": outcome["samples"],
                "times_plain": f"{ratio:.3f}",
                "extra_mib": f"{outcome['extra_mib']:.1f}" if clock.cuda else "",
                "product_tflops": f"{product:.4g}",
                "device": options.device,
                "triton": Clock.version("triton"),
                **here,
            }
            rows.append(row)
            print(
                f"{part:<8}{case.name:<30}{row['milliseconds']:>9} ms  {ratio:6.3f}  {row['extra_mib']} MiB", flush=True
            )
            write_rows(rows, options.results / "loss_negatives.csv")
        del inputs
        if clock.cuda:
            torch.cuda.empty_cache()
    if faults:
        sys.exit("not exact enough:\n" + "\n".join(faults))


def parse_arguments() -> argparse.Namespace:
    """Sizes and where to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, help="batch with own and same-side negatives")
    parser.add_argument("--own", type=int, default=8, help="own negatives a query")
    parser.add_argument("--queries", type=int, help="batch with frozen passages")
    parser.add_argument("--frozen", type=int, help="frozen passages")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--check-size", type=int, help="batch of the comparison with float64")
    parser.add_argument("--logit-scale", type=float, default=50)
    parser.add_argument("--workspace-mib", type=float, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    small = options.quick
    defaults = {
        "pairs": 128 if small else 65536,
        "queries": 64 if small else 1024,
        "frozen": 500 if small else 8_841_823,
        "dim": 32 if small else 768,
        "check_size": 96 if small else 3000,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    return options


@dataclass
class Inputs:
    """Unit vectors; the cosine of a pair is about 0.2."""

    query: Tensor
    passage: Tensor
    logit_scale: Tensor
    own: Ragged
    frozen: Tensor
    pinned: Tensor | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, part: str) -> Inputs:
        """Those of a part of the table, in bf16."""
        if part == "pairs":
            return cls.random(options, options.pairs, options.pairs * options.own, 0, torch.bfloat16)
        return cls.random(options, options.queries, 0, options.frozen, torch.bfloat16)

    @classmethod
    def random(cls, options: argparse.Namespace, pairs: int, own: int, frozen: int, dtype: torch.dtype) -> Inputs:
        """`own` rows over all queries, of unequal numbers if they do not divide evenly."""
        device, dim = options.device, options.dim
        generator = torch.Generator(device).manual_seed(pairs)

        def unit(rows: int) -> Tensor:
            # In blocks, because float32 copies of all frozen passages would not fit beside them.
            found = torch.empty(rows, dim, dtype=dtype, device=device)
            for block in found.split(1 << 20):
                block.copy_(normalize(torch.randn(block.shape, device=device, generator=generator), dim=1))
            return found

        query = unit(pairs)
        passage = normalize(unit(pairs).float() + 0.2 * query.float(), dim=1).to(dtype)
        offsets = (torch.arange(pairs + 1, device=device) * own) // pairs
        leaves = [query, passage, torch.tensor(float(options.logit_scale), device=device), unit(own)]
        query, passage, scale, values = (leaf.requires_grad_() for leaf in leaves)
        return cls(query, passage, scale, Ragged(values, offsets), unit(frozen))

    def step(self, case: Case, implementation: Any, workspace_mib: float, wide: bool = False) -> tuple[Tensor, ...]:
        """The loss, and the gradients of query, passage, logit_scale and own negatives; `wide` in float64."""
        frozen = self._pinned() if case.frozen == "pinned" else self.frozen if case.frozen else None
        leaves = [self.query, self.passage, self.logit_scale, self.own.values]
        if wide:
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
            frozen = None if frozen is None else frozen.to(self.query.device).double()
        own = Ragged(leaves[3], self.own.offsets) if case.own else None
        loss = inf_cl_loss(
            *leaves[:2],
            logit_scale=leaves[2],
            symmetric=case.symmetric,
            negatives=Negatives(own=own, frozen=frozen, same_side=case.same_side),
            implementation=implementation,
            workspace_mib=workspace_mib,
        )
        return loss.detach(), *torch.autograd.grad(loss, leaves if case.own else leaves[:3])

    def _pinned(self) -> Tensor:
        if self.pinned is None:
            self.pinned = torch.empty(self.frozen.shape, dtype=self.frozen.dtype, pin_memory=self.frozen.is_cuda)
            self.pinned.copy_(self.frozen)
        return self.pinned


def check(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """Compare every case with float64; returns those that miss their tolerance."""
    size, faults = options.check_size, []
    inputs = Inputs.random(options, size, 7 * size + 1, 9 * size + 1, dtype)
    for case in CASES:
        # A small workspace, so that there are several blocks.
        found = inputs.step(case, "auto" if options.device == "cpu" else "triton", options.workspace_mib / 16)
        truth = inputs.step(case, "full", 1, wide=True)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}, {size} queries"
        print(f"{name:<60} errors " + " ".join(f"{error:.1e}" for error in errors), flush=True)
        # The gradient of logit_scale is a sum with cancellation: only embeddings have a bound.
        worst = max(errors[1], errors[2], *errors[4:])
        if not worst <= TOLERANCE[dtype]:
            faults.append(f"{name}: relative error {worst:.2e}, at most {TOLERANCE[dtype]:g} expected")
    return faults


def measure(clock: Clock, inputs: Inputs, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step, and the memory it takes beside its inputs."""

    def run() -> Tensor:
        return inputs.step(case, "auto", options.workspace_mib)[0]

    run()
    extra = peak_of(run) if clock.cuda else 0.0
    longest = clock.milliseconds(run, 1)
    samples = max(3, min(SAMPLES, int(4000 / max(longest, 1e-3))))
    found = [clock.milliseconds(run, 1, led=True) for _ in range(samples)]
    return {"milliseconds": statistics.median(found), "samples": samples, "extra_mib": extra}


def peak_of(run: Callable[[], object]) -> float:
    """MiB that a step allocates beside what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


if __name__ == "__main__":
    main()
