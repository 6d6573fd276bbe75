"""Matryoshka and distillation beside the plain loss: time and memory of forward and backward, in one process.

    python scripts/benchmarks/losses/bench_nested.py --device cuda
    python scripts/benchmarks/losses/bench_nested.py --device cpu --quick

All of our rows are compared with float64 at --check-size before they are timed, and the script exits with 1 if one is
not exact enough. The other rows are how other packages compute it: one loss for each prefix of embeddings that torch
normalizes again, with the loss of memeff, and with ours. Rows go to loss_matryoshka.csv in scripts/results or where
--results says.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from index.files import atomic_path
from losses import inf_cl_loss
from losses.options import Matryoshka, Teacher
from losses.triton import shapes
from losses.triton.matryoshka.setup import MatryoshkaSetup
from losses.triton.shapes import TileShape
from scripts import RESULTS
from scripts.benchmarks.losses.loss_check import fault, relative_errors, unit_pairs
from scripts.benchmarks.losses.loss_clock import Clock, Outcome, Problem, attempted, best_product
from scripts.benchmarks.losses.loss_methods import (
    BF16,
    Found,
    Method,
    Pairs,
    host_value,
    refuse_fallback,
    through_autograd,
)
from scripts.benchmarks.machine import machine

# Shapes to try in place of the defaults.
SHAPES = {
    "prefix_sums": [
        TileShape(128, 128, 64, 8, 3, 8),
        TileShape(128, 64, 64, 4, 3, 16),
        TileShape(128, 64, 64, 4, 4, 8),
    ],
    "prefix_gradient": [
        TileShape(128, 128, 64, 8, 3, 8),
        TileShape(64, 128, 64, 4, 3, 8),
        TileShape(64, 64, 64, 4, 3, 8),
        TileShape(128, 64, 64, 4, 3, 16),
        TileShape(128, 64, 64, 8, 3, 8),
    ],
    "prefix_products": [
        TileShape(128, 128, 64, 8, 3, 8),
        TileShape(128, 128, 64, 8, 4, 8),
        TileShape(256, 128, 64, 8, 3, 8),
    ],
}
COMPILERS = 8
TEACHER_SHAPES = [TileShape(128, 64, 64, 4, 3, 8), TileShape(128, 64, 64, 8, 3, 8)]


def main() -> None:
    """Check, measure, write; exit with 1 if one of ours is not exact enough."""
    options = parse_arguments()
    if options.compile:
        compile_one(options)
        return
    if options.device == "cuda":
        compile_all(options)
    clock = Clock(options.device, options.seconds)
    deadline = time.monotonic() + options.budget
    rows, faults = [], list[str]()
    here = machine() | ({"commit": options.commit} if options.commit else {})
    product = 8192 if options.device == "cuda" and not options.quick else 256

    def write(name: str, outcome: Outcome, errors: dict[str, float], part: str) -> None:
        row = {
            "part": part,
            "method": name,
            "size": options.size,
            "dim": options.dim,
            "milliseconds": f"{outcome.milliseconds:.4g}" if outcome.milliseconds else "",
            "samples": outcome.samples,
            "extra_mib": f"{outcome.extra_mib:.1f}" if outcome.extra_mib is not None else "",
            "total_mib": f"{outcome.total_mib:.1f}" if outcome.total_mib is not None else "",
            **{f"error_{key}": f"{errors[key]:.2e}" if key in errors else "" for key in ("loss", "dq", "dk", "dscale")},
            "checked_at": options.check_size if errors else "",
            "status": outcome.problem.text if outcome.problem else "measured",
            "device": options.device,
            "triton": clock.version("triton"),
            **here,
        }
        rows.append(row)
        print(f"{name:<58}{row['milliseconds']:>9} ms {row['extra_mib']:>9} MiB  {row['status']}  {errors}", flush=True)
        with atomic_path(options.results / "loss_matryoshka.csv") as path, path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write("bf16 product", Outcome(best_product(clock, product), samples=20), {}, "ceiling")
    pairs = unit_pairs(options.size, options.dim, torch.bfloat16, 50, 0, options.device)
    small = unit_pairs(options.check_size, options.dim, torch.bfloat16, 50, 0, options.device)
    for part, methods in parts(options).items():
        ready, errors = [], dict[str, dict[str, float]]()
        for method, truth in methods:
            found = attempted(functools.partial(method.run, small), clock.cuda)
            if isinstance(found, Problem):
                write(method.name, Outcome(problem=found), {}, part)
                if method.tolerance and found.ours_to_mend:
                    faults.append(f"{method.name}: {found.text}")
                continue
            errors[method.name] = relative_errors(found, truth(small))
            wrong = fault(errors[method.name], method.tolerance) if method.tolerance else None
            if wrong:
                faults.append(f"{method.name}: {wrong}")
            ready.append(method)
        outcomes = clock.measure(ready, pairs, deadline)
        for method in ready:
            write(method.name, outcomes[method.name], errors[method.name], part)
        gc.collect()
    write("bf16 product", Outcome(best_product(clock, product), samples=20), {}, "ceiling")
    if faults:
        sys.exit("not exact enough:\n" + "\n".join(faults))


def compile_one(options: argparse.Namespace) -> None:
    """Run one method at the size of the check, which leaves its kernels in Triton's cache."""
    small = unit_pairs(options.check_size, options.dim, torch.bfloat16, 50, 0, options.device)
    for methods in parts(options).values():
        for method, _ in methods:
            if method.name == options.compile:
                method.run(small)


def compile_all(options: argparse.Namespace) -> None:
    """Compile the kernels of all methods in several processes; what fails is told when it is measured."""
    given = ["--check-size", options.check_size, "--dim", options.dim, "--teacher-dim", options.teacher_dim]
    given += ["--workspace-mib", options.workspace_mib, "--dims", *options.dims]
    names = [method.name for methods in parts(options).values() for method, _ in methods]

    def run(name: str) -> None:
        command = [sys.executable, __file__, *map(str, given), "--compile", name]
        subprocess.run(command, capture_output=True, check=False)

    with ThreadPoolExecutor(max_workers=COMPILERS) as pool:
        list(pool.map(run, names))


def parse_arguments() -> argparse.Namespace:
    """What to measure, where, and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="pairs (65536)")
    parser.add_argument("--dim", type=int, help="dimensions (768)")
    parser.add_argument("--dims", type=int, nargs="+", help="sizes of the prefixes (128 256 512 768)")
    parser.add_argument("--teacher-dim", type=int, help="dimensions of the teacher (768)")
    parser.add_argument("--check-size", type=int, help="pairs of the comparison with float64 (4096)")
    parser.add_argument("--parts", nargs="+", default=["methods", "shapes"], choices=("methods", "shapes"))
    parser.add_argument("--workspace-mib", type=float, default=256)
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring for a method")
    parser.add_argument("--budget", type=float, default=250, help="seconds in all; what is left then is left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the code, where there is no checkout to ask")
    parser.add_argument("--compile", help="run this method once and measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args()
    small = options.quick
    defaults = {
        "size": 96 if small else 65536,
        "dim": 48 if small else 768,
        "dims": [16, 32, 48] if small else [128, 256, 512, 768],
        "teacher_dim": 24 if small else 768,
        "check_size": 64 if small else 4096,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def parts(options: argparse.Namespace) -> dict[str, list[tuple[Method, Callable[[Pairs], Found]]]]:
    """Methods with the definition that each is compared with."""
    nested, prefixes = {"matryoshka": Matryoshka(tuple(options.dims))}, len(options.dims)
    implementation = "triton" if options.device == "cuda" else "chunked"
    mib = options.workspace_mib

    def ours(
        name: str, swapped: dict[str, TileShape] | None = None, changed: dict[str, Any] | None = None, **given: Any
    ) -> tuple[Method, Callable[[Pairs], Found]]:
        with_teacher = given.pop("teacher_dim", None)
        arguments = dict(given, implementation=implementation, workspace_mib=mib)
        run = functools.partial(run_ours, arguments, with_teacher, swapped or {}, changed or {})
        truth = functools.partial(definition, given, with_teacher)
        return Method(f"ours, {name}", run, tolerance=BF16), truth

    def peer(name: str, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
        return Method(f"{prefixes} losses of prefixes, {name}", functools.partial(by_prefix, loss_of, options.dims))

    truth = functools.partial(definition, nested, None)
    teacher = {"teacher_dim": options.teacher_dim}
    found = {
        "methods": [
            ours("plain"),
            ours("matryoshka", **nested),
            ours("matryoshka, products by cuBLAS", changed={"own_products_bytes": 0}, **nested),
            *(
                ours(f"matryoshka, {count} registers in {kernel}", changed={f"{kernel}_registers": count}, **nested)
                for kernel, count in (("sums", None), ("gradient", None), ("gradient", 128), ("gradient", 152))
            ),
            ours(f"teacher of {options.teacher_dim} dimensions", **teacher),
            (peer("ours", our_loss), truth),
            (peer("memeff", memeff_loss), truth),
        ],
        "shapes": [
            *(
                ours(f"matryoshka, {kernel} {label(shape)}", {kernel: shape}, **nested)
                for kernel, tried in SHAPES.items()
                for shape in tried
            ),
            *(
                ours(f"teacher, {kernel} {label(s)}", {kernel: s}, **teacher)
                for kernel in ("teacher_sums", "teacher_gradient")
                for s in TEACHER_SHAPES
            ),
        ],
    }
    return {name: found[name] for name in options.parts}


def label(shape: TileShape) -> str:
    """The fields that differ."""
    return f"{shape.block_m}×{shape.block_n}×{shape.block_k} w{shape.warps} s{shape.stages} g{shape.group}"


@functools.lru_cache(maxsize=2)
def teacher_sides(size: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bf16 unit vectors of a teacher."""
    generator = torch.Generator(device).manual_seed(size)
    sides = (torch.randn(size, dims, device=device, generator=generator) for _ in range(2))
    query, passage = (normalize(side, dim=1) for side in sides)
    return query.bfloat16(), normalize(passage + 0.3 * query, dim=1).bfloat16()


def with_teacher(given: dict[str, Any], dims: int | None, pairs: Pairs, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments, with a teacher if it has dimensions."""
    if dims is None:
        return given
    query, passage = (side.to(dtype) for side in teacher_sides(len(pairs.query), dims, pairs.query.device))
    return given | {"teacher": Teacher(query, passage, 20.0, 1.0)}


@contextmanager
def swapped_settings(swapped: dict[str, TileShape], changed: dict[str, Any]) -> Iterator[None]:
    """Other tile shapes in place of the defaults, and other attributes of the Matryoshka backend."""
    defaults = dict(shapes.DEFAULT_OPTIONS)
    before = {name: getattr(MatryoshkaSetup, name) for name in changed}
    for kernel, shape in swapped.items():
        shapes.DEFAULT_OPTIONS[kernel] = (shape, defaults[kernel][1])
    for name, value in changed.items():
        setattr(MatryoshkaSetup, name, value)
    try:
        yield
    finally:
        shapes.DEFAULT_OPTIONS.update(defaults)
        for name, value in before.items():
            setattr(MatryoshkaSetup, name, value)


def run_ours(
    given: dict[str, Any],
    teacher_dim: int | None,
    swapped: dict[str, TileShape],
    changed: dict[str, Any],
    pairs: Pairs,
) -> Found:
    """`inf_cl_loss`, both directions, in bf16."""
    refuse_fallback(pairs, given["implementation"])
    arguments = with_teacher(given, teacher_dim, pairs, pairs.query.dtype)
    with swapped_settings(swapped, changed):
        loss = inf_cl_loss(pairs.query, pairs.passage, logit_scale=pairs.logit_scale, symmetric=True, **arguments)
        return through_autograd(loss, pairs)


def definition(given: dict[str, Any], teacher_dim: int | None, pairs: Pairs) -> Found:
    """The definition in float64."""
    wide = Pairs(*(leaf.detach().double().requires_grad_() for leaf in pairs.leaves()))
    arguments = with_teacher(given, teacher_dim, pairs, torch.float64)
    loss = inf_cl_loss(
        wide.query, wide.passage, logit_scale=wide.logit_scale, symmetric=True, implementation="full", **arguments
    )
    return through_autograd(loss, wide)


def by_prefix(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], dims: list[int], pairs: Pairs) -> Found:
    """One loss for each prefix, of embeddings that torch normalizes again."""
    sides = pairs.query, pairs.passage
    losses = [loss_of(*(normalize(side[:, :size], dim=1) for side in sides), pairs.logit_scale) for size in dims]
    return through_autograd(torch.stack(losses).sum(), pairs)


def our_loss(query: Tensor, passage: Tensor, logit_scale: Tensor) -> Tensor:
    return inf_cl_loss(query, passage, logit_scale=logit_scale, symmetric=True)


def memeff_loss(query: Tensor, passage: Tensor, logit_scale: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    criterion = MemoryEfficientCLIPLoss(1 / host_value(logit_scale), normalized_inputs=True, stable=False)
    return criterion(query, passage)


if __name__ == "__main__":
    main()
