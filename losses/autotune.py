"""Measure tile shapes on this machine's GPU: `python -m losses.autotune [--out FILE]`.

For each kernel, precision and embedding dimension, the loss is run with each candidate shape. The fastest is written
to a table, which the losses read if the environment variable DENSE_RETRIEVER_SHAPES names it. Candidates are compiled
first, in several processes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from losses.inf_cl import inf_cl_loss
from losses.precision import Precision
from losses.sigmoid import sigmoid_loss
from losses.triton.shapes import KERNELS, VARIABLE, TileShape, table_row, write_shapes

CANDIDATES = {
    2: (
        TileShape(128, 128, 64, warps=4, stages=3, group=8),
        TileShape(128, 128, 64, warps=4, stages=3, group=16),
        TileShape(128, 128, 64, warps=4, stages=3, group=8, persistent=1),
        TileShape(128, 128, 64, warps=4, stages=3, group=16, persistent=1),
        TileShape(128, 128, 64, warps=8, stages=3, group=8),
        TileShape(128, 256, 64, warps=8, stages=3, group=8, persistent=1),
        TileShape(128, 256, 64, warps=8, stages=3, group=16, persistent=1),
        TileShape(128, 256, 64, warps=8, stages=4, group=8, persistent=1),
        TileShape(128, 256, 64, warps=8, stages=4, group=8),
        TileShape(256, 128, 64, warps=8, stages=3, group=8, persistent=1),
    ),
    4: (
        TileShape(128, 128, 32, warps=4, stages=3, group=8),
        TileShape(128, 128, 32, warps=8, stages=3, group=8),
        TileShape(128, 128, 32, warps=4, stages=3, group=8, persistent=1),
        TileShape(128, 128, 32, warps=8, stages=3, group=8, persistent=1),
        TileShape(128, 64, 32, warps=4, stages=3, group=8),
    ),
}
KEPT_GRADIENT_CANDIDATES = (
    TileShape(64, 128, 64, warps=4, stages=1, group=8),
    TileShape(64, 128, 64, warps=8, stages=1, group=8),
    TileShape(128, 128, 64, warps=4, stages=1, group=8),
    TileShape(128, 128, 64, warps=8, stages=1, group=8),
    TileShape(64, 256, 64, warps=8, stages=1, group=8),
    TileShape(32, 256, 64, warps=4, stages=1, group=8),
)
PRECISIONS: dict[str, tuple[torch.dtype, Precision]] = {
    "bfloat16": (torch.bfloat16, "bf16"),
    "float16": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
}
REPEATS = 7


@dataclass(frozen=True)
class Trial:
    """One kernel with one tile shape, for embeddings of one precision and dimension."""

    kernel: str
    precision: str
    dim: int
    shape: TileShape

    def table(self, folder: Path) -> Path:
        """Write a table with this shape alone and return its path."""
        path = folder / f"{self.kernel}-{self.precision}-{self.dim}-{'-'.join(map(str, asdict(self.shape).values()))}"
        name = torch.cuda.get_device_name()
        write_shapes(path, [table_row(name, self.kernel, self.precision, self.dim, self.shape)])
        return path

    def step(self, rows: int) -> Callable[[], None]:
        """A function that runs the loss, with backward if the kernel belongs to backward."""
        dtype, precision = PRECISIONS[self.precision]
        generator = torch.Generator("cuda").manual_seed(0)

        def embeddings() -> torch.Tensor:
            drawn = torch.randn(rows, self.dim, device="cuda", generator=generator)
            return torch.nn.functional.normalize(drawn, dim=1).to(dtype).requires_grad_(self.kernel != "sums")

        query, passage = embeddings(), embeddings()

        # Enough memory to keep all exponentials, or none.
        workspace_mib = rows**2 / 2**19 + 256 if self.kernel.startswith("kept") else 256

        def run() -> None:
            if self.kernel == "sigmoid":
                sigmoid_loss(
                    query, passage, logit_scale=10.0, logit_bias=-10.0, precision=precision, implementation="triton"
                )
                return
            loss = inf_cl_loss(
                query,
                passage,
                logit_scale=50.0,
                symmetric=True,
                precision=precision,
                implementation="triton",
                workspace_mib=workspace_mib,
            )
            if self.kernel.endswith("gradient"):
                torch.autograd.grad(loss, (query, passage))

        return run


def candidates(kernel: str, precision: str) -> tuple[TileShape, ...]:
    """The candidate shapes for a kernel."""
    return KEPT_GRADIENT_CANDIDATES if kernel == "kept_gradient" else CANDIDATES[PRECISIONS[precision][0].itemsize]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shapes.json"), help="table to write (%(default)s)")
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[128, 384, 768, 1024], help="embedding dimensions to measure"
    )
    parser.add_argument("--rows", type=int, default=32768, help="number of queries and passages (%(default)s)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="kernels to measure (all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("losses.autotune: expected a CUDA GPU, found none", file=sys.stderr)
        return 1
    trials = [
        Trial(kernel, precision, dim, shape)
        for kernel, precision, dim in itertools.product(arguments.kernels, PRECISIONS, arguments.dims)
        # Exponentials are kept in bf16 only.
        if not kernel.startswith("kept") or precision == "bfloat16"
        for shape in candidates(kernel, precision)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn) as pool:
            fits = list(pool.map(_compile, trials, itertools.repeat(folder)))
        timed = {
            trial: _milliseconds(trial, folder, arguments.rows) for trial, fit in zip(trials, fits, strict=True) if fit
        }
    rows = []
    for case, group in itertools.groupby(timed, key=lambda trial: (trial.kernel, trial.precision, trial.dim)):
        best = min(group, key=lambda trial: timed[trial])
        rows.append(table_row(torch.cuda.get_device_name(), *case, best.shape))
        print(*case, best.shape, f"{timed[best]:.3f} ms", flush=True)
    write_shapes(arguments.out, rows)
    return 0


def _compile(trial: Trial, folder: Path) -> bool:
    """Compile the trial's kernels into Triton's cache by a small run; False if they need too many resources."""
    from triton.runtime.errors import OutOfResources

    os.environ[VARIABLE] = str(trial.table(folder))
    try:
        trial.step(256)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def _milliseconds(trial: Trial, folder: Path, rows: int) -> float:
    """Median time of a step in milliseconds."""
    os.environ[VARIABLE] = str(trial.table(folder))
    run = trial.step(rows)
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.exit(main())
