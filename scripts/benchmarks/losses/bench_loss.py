"""Contrastive losses side by side: time and memory of forward and backward, on the same tensors in one process.

    python scripts/benchmarks/losses/bench_loss.py --device cuda
    python scripts/benchmarks/losses/bench_loss.py --device cpu --quick
    python scripts/benchmarks/losses/bench_loss.py --device cuda --parts masks small_masks masks_memory \\
        --table loss_masks.csv

Every method's loss and gradients are compared with float64 before its time is printed. If one of ours exceeds its
tolerance, the script exits with 1 after writing. Rows are written to loss.csv, plots to loss_memory.png and
loss_time.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import RESULTS
from scripts.benchmarks.losses.loss_check import FIGURES, Check, compared, unit_pairs
from scripts.benchmarks.losses.loss_clock import Clock, Outcome, Problem, best_product
from scripts.benchmarks.losses.loss_methods import Method, Pairs, methods, open_workspace, with_masks, with_small_masks
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows
from scripts.benchmarks.timing import release_memory

SIZES = [1024, 4096, 16384, 65536, 262144, 1048576]
DIMS = [64, 128, 384, 512, 640, 768, 1024, 1152, 4096]
PARTS = ["sizes", "masks", "small_masks", "masks_memory", "workspaces", "dims"]
# The most memory is taken by further positives, by the guide and by statistics.
MEMORY_MASKS = ("further positives", "guide", "statistics")
WORKSPACES = [64, 128, 512, 1024, 2560, 5120]


def main() -> None:
    """Compare with float64, measure and write. Exits with 1 if one of our losses is not exact enough."""
    options = parse_arguments()
    bench = Bench(options)
    parts = {
        "sizes": bench.sizes,
        "dims": bench.dims,
        "masks": bench.masks,
        "small_masks": bench.small_masks,
        "masks_memory": bench.masks_memory,
        "workspaces": bench.workspaces,
    }
    for name in options.parts:
        parts[name]()
        bench.write()
    bench.finish()
    if bench.faults:
        sys.exit("not exact enough:\n" + "\n".join(bench.faults))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes at --dim")
    parser.add_argument("--dim", type=int, help="dimensions for --sizes")
    parser.add_argument("--dims", type=int, nargs="*", help="dimensions of our kernels at --dims-size")
    parser.add_argument("--dims-size", type=int, help="batch size for --dims")
    parser.add_argument("--knob-size", type=int, help="batch size of the parts masks and workspaces")
    parser.add_argument("--small-sizes", type=int, nargs="*", help="batch sizes of the part small_masks")
    parser.add_argument("--memory-size", type=int, help="batch size of the part masks_memory")
    parser.add_argument("--methods", nargs="*", default=[], help="only methods whose name contains one of these")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--check-size", type=int, help="batch size of the comparison with float64")
    parser.add_argument("--logit-scale", type=float, default=50, help="default: %(default)s")
    parser.add_argument("--logit-bias", type=float, default=-10, help="of the sigmoid loss (default: %(default)s)")
    parser.add_argument(
        "--workspace-mib", type=float, default=256, help="workspace of our losses (default: %(default)s)"
    )
    parser.add_argument(
        "--open-mib",
        type=float,
        default=9500,
        help="workspace of our kernels on a GPU with free memory (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="measuring time per method and size (default: %(default)s)"
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=5.0,
        help="seconds per call above which a method is left out (default: %(default)s)",
    )
    parser.add_argument("--budget", type=float, default=400, help="time limit in seconds (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for loss.csv and the plots (default: %(default)s)"
    )
    parser.add_argument(
        "--table", default="loss.csv", help="file in --results; plots are drawn for the default (default: %(default)s)"
    )
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    options = parser.parse_args()
    small = options.quick
    defaults = {
        "sizes": [128, 256] if small else SIZES,
        "dim": 32 if small else 768,
        "dims": [16, 40] if small else DIMS,
        "dims_size": 128 if small else 65536,
        "knob_size": 128 if small else 65536,
        "small_sizes": [128] if small else [1024, 4096],
        "memory_size": 256 if small else 262144,
        "parts": PARTS,
        "check_size": 128 if small else 4096,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can use, found none")
    return options


class Bench:
    """Measures the parts and collects the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = Clock(options.device, options.seconds)
        self.deadline = time.monotonic() + options.budget
        self.here = machine(options.commit)
        self.methods = [
            method
            for method in methods(options.workspace_mib, options.open_mib)
            if not options.methods or any(part in method.name for part in options.methods)
        ]
        self.rows: list[dict[str, str]] = []
        self.faults: list[str] = []
        self.checks: dict[tuple[str, int], Check] = {}
        self.known: dict[tuple[str, int], tuple[int, Outcome]] = {}
        self.product()

    def product(self) -> None:
        """Measure the ceiling in the same run: the rate of the vendor library's bf16 matrix product."""
        size = 8192 if self.options.device == "cuda" and not self.options.quick else 256
        milliseconds = best_product(self.clock, size)
        speed = 2 * size**3 / milliseconds / 1e9
        self.row("bf16 product", size, size, Outcome(milliseconds, samples=20), tflops=speed, part="ceiling")

    def sizes(self) -> None:
        """All methods at --dim, each up to its own largest size."""
        for size in self.options.sizes:
            self.measure(self.methods, size, self.options.dim, "sizes")
            self.write()

    def dims(self) -> None:
        """Our kernels in bf16 at other dimensions."""
        some = self.kernels()
        for dim in self.options.dims:
            self.measure(some, self.options.dims_size, dim, "dims")

    def workspaces(self) -> None:
        """Our kernels in bf16 with different workspace sizes."""
        some = [*self.kernels(), *(open_workspace(mib) for mib in [*WORKSPACES, self.options.open_mib])]
        self.measure(some, self.options.knob_size, self.options.dim, "workspaces")

    def masks(self) -> None:
        """The cost of positive indices, ids, excluded pairs and the options of the loss."""
        some = [*self.kernels(), *with_masks(self.options.workspace_mib)]
        self.measure(some, self.options.knob_size, self.options.dim, "masks")

    def small_masks(self) -> None:
        """The same for small batches."""
        for size in self.options.small_sizes:
            self.measure(with_small_masks(self.options.workspace_mib), size, self.options.dim, "small_masks")

    def masks_memory(self) -> None:
        """Memory at a large batch."""
        wanted = tuple(f", {name}" for name in MEMORY_MASKS)
        some = [method for method in with_masks(self.options.workspace_mib) if method.name.endswith(wanted)]
        self.measure([*self.kernels(), *some], self.options.memory_size, self.options.dim, "masks_memory")

    def kernels(self) -> list[Method]:
        """Our kernels in bf16 with the default workspace."""
        return [method for method in self.methods if method.name == "ours, triton bf16"]

    def measure(self, some: list[Method], size: int, dim: int, part: str) -> None:
        """Add a row for each method. Methods of one dtype alternate on the same tensors."""
        for dtype in dict.fromkeys(method.operands for method in some):
            outcomes: dict[str, Outcome] = {}
            ready = []
            for method in (method for method in some if method.operands == dtype):
                problem = self.obstacle(method, size, dim)
                if problem is None:
                    ready.append(method)
                else:
                    outcomes[method.name] = Outcome(problem=problem)
            if ready:
                pairs = self.pairs(size, dim, ready[0])
                outcomes.update(self.clock.measure(ready, pairs, self.deadline))
                del pairs
                release_memory()
            for method in some:
                if method.name not in outcomes:
                    continue
                outcome = outcomes[method.name]
                self.known[method.name, dim] = (size, outcome)
                tflops = None
                if outcome.milliseconds:
                    tflops = 2 * method.products * size**2 * dim / outcome.milliseconds / 1e9
                self.row(method.name, size, dim, outcome, tflops, part, method)

    def obstacle(self, method: Method, size: int, dim: int) -> Problem | None:
        """Why a method is not measured at a size, or None. Compares it with float64 first."""
        if dim % method.dim_of:
            return Problem(f"dimensions must be a multiple of {method.dim_of}")
        if time.monotonic() > self.deadline:
            return Problem("no time left")
        check = self.checked(method, dim)
        if check.problem is not None:
            return check.problem
        if size > method.largest:
            return Problem("not asked for")
        before, outcome = self.known.get((method.name, dim), (size, Outcome()))
        if before < size and outcome.problem is not None and outcome.problem.grows:
            return outcome.problem
        expected = (outcome.milliseconds or 0) / 1000 * (size / before) ** 2
        if before >= 16384 and expected > self.options.longest and not method.patient:
            return Problem(f"slower than {self.options.longest:g} s", grows=True)
        return None

    def pairs(self, size: int, dim: int, method: Method) -> Pairs:
        """Embeddings in the method's dtype."""
        options = self.options
        return unit_pairs(size, dim, method.operands, options.logit_scale, options.logit_bias, options.device)

    def checked(self, method: Method, dim: int) -> Check:
        """Compare a method with float64, once for each dimension."""
        key = (method.name, dim)
        if key not in self.checks:
            pairs = self.pairs(self.options.check_size, dim, method)
            check = self.checks[key] = compared(method, pairs)
            if check.fault:
                self.faults.append(f"{method.name} at {self.options.check_size} × {dim}: {check.fault}")
            del pairs
            release_memory()
        return self.checks[key]

    def row(
        self,
        name: str,
        size: int,
        dim: int,
        outcome: Outcome,
        tflops: float | None,
        part: str,
        method: Method | None = None,
    ) -> None:
        """Add a row and print it."""
        check = self.checks.get((name, dim), Check({}))
        errors = {f"error_{key}": number(check.errors.get(key), "{:.2e}") for key in FIGURES}
        row = {
            "part": part,
            "method": name,
            "package": self.clock.version(method.package) if method and method.package else "",
            "kind": method.kind if method else "",
            "operands": str(method.operands).removeprefix("torch.") if method else "bfloat16",
            "size": str(size),
            "dim": str(dim),
            "milliseconds": number(outcome.milliseconds, "{:.4g}"),
            "samples": str(outcome.samples),
            "tflops": number(tflops, "{:.4g}"),
            "of_product": "",
            "times_ours": "",
            "extra_mib": number(outcome.extra_mib, "{:.1f}"),
            "total_mib": number(outcome.total_mib, "{:.1f}"),
            "loss": number(outcome.loss, "{:.6g}"),
            **errors,
            "checked_at": str(self.options.check_size) if check.errors else "",
            "exact": ("no" if check.fault else "yes") if method and method.tolerance and check.errors else "",
            "status": outcome.problem.text if outcome.problem else "measured",
            "device": self.options.device,
            "triton": self.clock.version("triton"),
            **self.here,
        }
        self.rows.append(row)
        shown = f"{row['milliseconds']:>9} ms {row['tflops']:>7} TFLOP/s {row['extra_mib']:>9} MiB extra"
        worst = max((value for key, value in check.errors.items() if key != "loss"), default=None)
        print(
            f"{size:>8} × {dim:<5}{name:<34}{shown if row['milliseconds'] else row['status']:<54}"
            + (f" errors: loss {row['error_loss']}, gradients {worst:.1e}" if worst is not None else ""),
            flush=True,
        )

    def write(self) -> None:
        """Write the rows so far."""
        ceiling = max(float(row["tflops"]) for row in self.rows if row["part"] == "ceiling")
        kernels = ("ours, triton bf16", "ours, sigmoid triton bf16")
        own = {
            (row["part"], row["size"], row["dim"], row["kind"]): float(row["milliseconds"])
            for row in self.rows
            if row["method"] in (("ours, auto bf16",) if row["part"] == "small_masks" else kernels)
            and row["milliseconds"]
        }
        for row in self.rows:
            base = own.get((row["part"], row["size"], row["dim"], row["kind"]))
            row["of_product"] = f"{float(row['tflops']) / ceiling:.3f}" if row["tflops"] else ""
            row["times_ours"] = f"{float(row['milliseconds']) / base:.3f}" if base and row["milliseconds"] else ""
        write_rows(self.rows, self.options.results / self.options.table)

    def finish(self) -> None:
        """Measure the ceiling again, because clock rates change as a device warms up; then write the table and the
        plots."""
        from scripts.benchmarks.losses.loss_plots import draw

        self.product()
        self.write()
        if self.options.table == "loss.csv":
            draw(self.options.results)


def number(value: float | None, form: str) -> str:
    """Format a number, or return an empty string for None."""
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    main()
