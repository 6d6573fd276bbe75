"""Measure tile shapes on this machine's GPU: `python -m losses.autotune [--out FILE]`.

For each kernel, precision and number of dimensions the loss runs with each candidate, and the fastest is written to a
table that DENSE_RETRIEVER_SHAPES=FILE makes the losses read. Candidates are compiled beforehand, by several processes.
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
    """A kernel with a shape, on embeddings of one precision and size."""

    kernel: str
    precision: str
    dim: int
    shape: TileShape

    def table(self, folder: Path) -> Path:
        """A file that makes the losses use the shape."""
        path = folder / f"{self.kernel}-{self.precision}-{self.dim}-{'-'.join(map(str, asdict(self.shape).values()))}"
        name = torch.cuda.get_device_name()
        write_shapes(path, [table_row(name, self.kernel, self.precision, self.dim, self.shape)])
        return path

    def step(self, rows: int) -> Callable[[], None]:
        """The loss, and its backward where the kernel belongs to that."""
        dtype, precision = PRECISIONS[self.precision]
        generator = torch.Generator("cuda").manual_seed(0)

        def embeddings() -> torch.Tensor:
            drawn = torch.randn(rows, self.dim, device="cuda", generator=generator)
            return torch.nn.functional.normalize(drawn, dim=1).to(dtype).requires_grad_(self.kernel != "sums")

        query, passage = embeddings(), embeddings()

        # What keeps all exponentials, and what keeps none.
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
    """The shapes that are tried for a kernel."""
    return KEPT_GRADIENT_CANDIDATES if kernel == "kept_gradient" else CANDIDATES[PRECISIONS[precision][0].itemsize]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shapes.json"), help="the table to write (%(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 384, 768, 1024], help="dimensions to measure")
    parser.add_argument("--rows", type=int, default=32768, help="queries and passages of a trial (%(default)s)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="those to measure (all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("losses.autotune: expected a CUDA GPU, found none", file=sys.stderr)
        return 1
    trials = [
        Trial(kernel, precision, dim, shape)
        for kernel, precision, dim in itertools.product(arguments.kernels, PRECISIONS, arguments.dims)
        # Exponentials are kept in bf16 alone.
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
    """Run the trial at a small size, which leaves its kernels in Triton's cache; False where it needs too much."""
    from triton.runtime.errors import OutOfResources

    os.environ[VARIABLE] = str(trial.table(folder))
    try:
        trial.step(256)()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def _milliseconds(trial: Trial, folder: Path, rows: int) -> float:
    """Median time of a step."""
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
