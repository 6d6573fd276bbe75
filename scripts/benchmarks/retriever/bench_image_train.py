"""Image–text training: a whole step against its towers alone, and locked image towers against encoding the images.

    python scripts/benchmarks/retriever/bench_image_train.py --commit HASH                   one H200, under 6 minutes
    python scripts/benchmarks/retriever/bench_image_train.py --parts whole --keep-rows       a million pairs from pixels
    python scripts/benchmarks/retriever/bench_image_train.py --device cpu --quick            tiny sizes

Pixels and texts are SYNTHETIC: random bytes in host memory, and random token ids with lengths like those of web
captions. bench_images.py measures decoding. Weights are random; this does not change the cost.

The parts, each comparing in one process on the same batch:

- train: the loss with its gradients on embeddings of the batch's shape; a whole step (`TrainStep`: pixels from the
  host, gradient cache, loss, clipping, optimizer); and the towers' forward, backward and second forward on the same
  micro-batches, with pixels already on the device and without a loss.
- lit: a step with a locked image tower (LiT) on precomputed features, against the same step plus one forward of every
  image through the image encoder. (A gradient cache without features would encode each image twice.)
- million: the same step with a million pairs; features, token ids, embeddings and their gradients stay on the host.
- whole: a step with a million pairs from pixels and both towers trained, all data on the host. 65,536 images are used
  sixteen times each: the bytes copied to the device are the same, in a sixteenth of the host memory.

Rows are written to image_train.csv as they are measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from losses import InfCLLoss
from retriever.config.loss import LossConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.data.images.batches import ImageInputs
from retriever.data.length_sorting import make_micro_batches
from retriever.data.micro_batches import PreparedBatch, TextInputs
from retriever.models.images.towers import ImageTextTowers
from retriever.models.memory import GraphMemory
from retriever.models.mixed_precision import mixed_precision
from retriever.training.memory_plan import plan_step
from retriever.training.optimization.optim import build_optimizer
from retriever.training.step import MicroBatch, TrainStep
from retriever.utils.device import Precision, autocast, to_device
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import read_rows, write_rows
from scripts.benchmarks.retriever.image_pairs import RepeatedImages, build_towers_of, on, random_captions
from scripts.benchmarks.timing import MIB, release_memory, synchronize

# Seconds reserved for the parts after `train`, on one H200.
LATER_PARTS_SECONDS = 110


def main() -> None:
    """Measure every part for which there is time; write the rows after each."""
    options = parse_arguments()
    bench = Bench(options)
    parts = {"train": bench.train, "lit": bench.locked, "million": bench.million, "whole": bench.whole}
    for name in options.parts:
        parts[name]()
        release_memory()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    names = ("train", "lit", "million", "whole")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=["train", "lit", "million"],
        help="parts to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--tower", default="ViT-B/16", help="image tower that is trained at --batch (default: %(default)s)"
    )
    parser.add_argument("--locked", nargs="+", default=["ViT-B/16"], help="locked image towers (default: %(default)s)")
    parser.add_argument(
        "--largest", default="ViT-B/32", help="image tower that is trained at --million (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=65536, help="pairs per step (default: %(default)s)")
    parser.add_argument("--million", type=int, default=2**20, help="pairs of the largest steps (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds of step and towers, if there is time (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers of the towers with torch.compile")
    parser.add_argument(
        "--budget",
        type=float,
        default=330,
        help="time limit in seconds; parts that do not fit are left out (default: %(default)s)",
    )
    parser.add_argument("--keep-rows", action="store_true", help="keep the rows that image_train.csv already has")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for image_train.csv (default: %(default)s)"
    )
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches, to test the script")
    options = parser.parse_args()
    if options.quick:
        options.tower, options.locked, options.largest = "tiny", ["tiny"], "tiny"
        options.batch, options.million = 32, 64
    return options


@dataclass(frozen=True)
class Run:
    """A training step with its towers, and a batch for it."""

    step: TrainStep
    batch: PreparedBatch
    planned_mib: float
    """Peak memory that `retriever train --dry-run` prints."""
    seconds_per_pair: float
    """In a small step, which keeps most of its graphs."""

    @property
    def towers(self) -> Any:
        """The ImageTextTowers."""
        return self.step.towers

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of both towers."""
        return [MicroBatch(group, rows) for group in self.batch.groups for rows in group.micro_batches]

    def whole_step(self) -> Callable[[], Any]:
        """A function that runs one whole step."""
        return lambda: self.step(self.batch, 0)

    def alone(self) -> None:
        """Run forward, backward and second forward of the towers, micro-batch by micro-batch."""
        with mixed_precision(self.towers, self.step.precision):
            for again in (False, True):
                for micro in self.micro_batches:
                    with torch.set_grad_enabled(again):
                        embeddings = micro.group.embed(self.towers, micro.rows)
                    if again:
                        embeddings.backward(torch.full_like(embeddings, 1e-3))
        self.towers.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Timed:
    """Time and peak memory of one call."""

    seconds: float
    peak_mib: float
    """Of torch's allocator; 0 on a CPU."""


class Bench:
    """Measures the parts and collects the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.precision: Precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.started = time.monotonic()
        self.about = {**machine(options.commit), "precision": self.precision, "data": "synthetic pixels and token ids"}
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        known = options.results / "image_train.csv"
        if options.keep_rows and known.exists():
            self.rows = {row_key(row): row for row in read_rows(known)}
        self._pixels: torch.Tensor | None = None

    def train(self) -> None:
        """Train both towers: the loss alone, then a whole step and the towers alone, alternately."""
        name, size = self.options.tower, self.options.batch
        run = self.run(name, size, lock=False)
        # Measured first, so that no kernel is compiled within a step.
        alone = self.loss_alone(run)
        loss = statistics.median([self.timed(alone).seconds for _ in range(6)][1:])
        steps: list[Timed] = []
        towers: list[Timed] = []
        for number in range(self.options.rounds):
            if number and self.left() < 1.2 * (steps[0].seconds + towers[0].seconds) + LATER_PARTS_SECONDS:
                print("no time left for another round", flush=True)
                break
            steps.append(self.timed(run.whole_step()))
            step = statistics.median(each.seconds for each in steps)
            peak = max(each.peak_mib for each in steps)
            note = f"{describe_plan(run)}; {len(steps)} measured"
            self.row("step", name, size, step, peak_mib=peak, planned_mib=run.planned_mib, note=note)
            self.row("loss and its gradients", name, size, loss, of_step=loss / step)
            on_device = replace(run, batch=on(run.batch, self.device))
            towers.append(self.timed(on_device.alone))
            del on_device
            bare = statistics.median(each.seconds for each in towers)
            ratio = statistics.median(s.seconds / t.seconds for s, t in zip(steps, towers, strict=True))
            self.row("towers: forward, backward, forward", name, size, bare, step_over_this=ratio)

    def locked(self) -> None:
        """A step on features against encoding every image of the batch."""
        size = self.options.batch
        for name in self.options.locked:
            run = self.run(name, size, lock=True)
            steps = [self.timed(run.whole_step()) for _ in range(4)][1:]
            step, peak = statistics.median(each.seconds for each in steps), max(each.peak_mib for each in steps)
            self.row(
                "LiT step on features",
                name,
                size,
                step,
                peak_mib=peak,
                planned_mib=run.planned_mib,
                note=describe_plan(run),
            )
            if self.left() < 60:
                print(f"{name}: no time left to encode its images", flush=True)
                continue
            pixels = self.pixels(run.towers, size)
            self.encode(run, pixels[:4096])
            anew = step + self.timed(partial(self.encode, run, pixels)).seconds
            self.row("LiT step that encodes its images", name, size, anew, times_features=anew / step)
            del run
            release_memory()

    def million(self) -> None:
        """A step on features with --million pairs."""
        self.largest("LiT step on features, data offload", self.options.locked[0], lock=True)

    def whole(self) -> None:
        """A step from pixels with --million pairs."""
        self.largest("step, data offload", self.options.largest, lock=False)

    def largest(self, what: str, name: str, *, lock: bool) -> None:
        """Measure one step with --million pairs and all of its data on the host."""
        size = self.options.million
        run = self.run(name, size, lock=lock, offload=True)
        # A small step keeps its graphs, which saves a forward of four, and its loss costs almost nothing.
        needed = 1.6 * size * run.seconds_per_pair
        if self.left() < needed:
            print(f"{what}, {name}: skipped, needs about {needed:.0f} s and {self.left():.0f} s are left", flush=True)
            return
        step = self.timed(run.whole_step())
        self.row(
            *(what, name, size, step.seconds),
            peak_mib=step.peak_mib,
            planned_mib=run.planned_mib,
            note=f"{describe_plan(run)}; host memory {psutil.Process().memory_info().rss / MIB:.0f} MiB",
        )

    def run(self, name: str, size: int, *, lock: bool, offload: bool = False) -> Run:
        """Build the towers, the step, and a batch of pixels (of features for a locked image tower)."""
        towers = build_towers_of(name, lock=lock).to(self.device)
        if self.device.type == "cuda" and not towers.enable_packing():
            sys.exit("expected a text tower that runs without padding, found one that does not")
        if self.options.compile:
            towers.compile_layers()
        config = TrainConfig(
            loss=LossConfig(symmetric=True, logit_scale=1 / 0.07, learn_logit_scale=True),
            optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.95), warmup_fraction=0),
            batch_size=size,
            offload_embeddings=offload,
        )
        loss = InfCLLoss(logit_scale=config.loss.logit_scale, learnable=True, symmetric=True).to(self.device)
        graphs = GraphMemory.plan(
            towers,
            self.precision,
            texts=2 * size,
            workspace_mib=config.loss.workspace_mib,
            micro_batch_tokens=None,
            offload_embeddings=offload,
        )
        modules = torch.nn.ModuleDict({"towers": towers, "loss": loss})
        optimizer = build_optimizer(modules.named_parameters(), config.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        step = TrainStep(config, self.precision, towers, loss, optimizer, scaler, graphs, 100)
        batch, few = (self.batch(towers, n, graphs.micro_batch_tokens, lock=lock) for n in (size, min(size, 4096)))
        plan = plan_step(
            config, towers, loss, optimizer, graphs, batch, precision=self.precision, ranks=1, batches_waiting=1
        )
        # A small batch first: it compiles and selects kernels and allocates memory.
        warm = [self.timed(lambda: step(few, 0)) for _ in range(2)][-1]
        return Run(step, batch, plan.peak / MIB, warm.seconds / few.queries)

    def batch(self, towers: ImageTextTowers, size: int, budget: int, *, lock: bool) -> PreparedBatch:
        """Random pixels or features, and texts, split into micro-batches as in training."""
        tokens = random_captions(size)
        content = torch.randn(size, towers.image_feature_dim).half() if lock else self.pixels(towers, size)
        each = 1 if lock else towers.image_tokens
        at_once = min(max(1, budget // each), len(content))
        places = [np.arange(first, min(first + at_once, size)) for first in range(0, size, at_once)]
        images = ImageInputs(content, each, places) if lock else RepeatedImages(content, each, places, size)
        padded = not towers.padding_free
        texts = TextInputs(
            "document", tokens, make_micro_batches(tokens.lengths, budget, padded=padded, device=towers.device.type)
        )
        return PreparedBatch([images, texts], size, None, padded)

    def pixels(self, towers: ImageTextTowers, size: int) -> torch.Tensor:
        """Random pixels in host memory, created once: uint8 [at most --batch, 3, height, width]."""
        shape = (min(size, self.options.batch), 3, *towers.transform.size)
        if self._pixels is None or len(self._pixels) < shape[0]:
            self._pixels = torch.empty(shape, dtype=torch.uint8)
            # One random block, repeated: every copy to the device still reads its own memory.
            block = torch.randint(0, 256, (min(shape[0], 512), *shape[1:]), dtype=torch.uint8)
            for part in self._pixels.split(len(block)):
                part.copy_(block[: len(part)])
        return self._pixels[: shape[0]]

    def loss_alone(self, run: Run) -> Callable[[], None]:
        """A function that computes the loss and its gradients on random embeddings of unit length."""
        shape = (len(run.batch.groups[0]), run.towers.dimension)
        embeddings = [torch.nn.functional.normalize(torch.randn(shape, device=self.device), dim=1) for _ in range(2)]

        def once() -> None:
            query, passage = (each.clone().requires_grad_() for each in embeddings)
            with autocast(self.device, self.precision):
                run.step.loss(query, passage).backward()
            run.step.loss.zero_grad(set_to_none=True)

        return once

    def encode(self, run: Run, pixels: torch.Tensor) -> None:
        """Encode every image once with the locked encoder, from host memory."""
        at_once = max(1, 131072 // run.towers.image_tokens)
        with mixed_precision(run.towers, self.precision), torch.inference_mode():
            for part in pixels.split(at_once):
                run.towers.image_features(to_device(part, run.towers.device))

    def timed(self, call: Callable[[], Any]) -> Timed:
        """Time one call. The allocator keeps its blocks, as it does between training steps."""
        gc.collect()
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return Timed(seconds, torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else 0.0)

    def left(self) -> float:
        """Remaining seconds of the budget."""
        return float(self.options.budget - (time.monotonic() - self.started))

    def row(self, what: str, tower: str, size: int, seconds: float, **more: Any) -> None:
        """Add, print and write a row. It replaces an earlier row of the same measurement."""
        figures = {"peak_mib": 0.0, "planned_mib": 0.0, "step_over_this": 0.0, "of_step": 0.0, "times_features": 0.0}
        note = more.pop("note", "")
        shown = {key: f"{more[key]:.4g}" if key in more else "" for key in figures}
        row = {
            "part": what,
            "image_tower": tower,
            "pairs": size,
            "seconds": f"{seconds:.4g}",
            "pairs_per_second": f"{size / seconds:.0f}",
            **shown,
            "compiled": "yes" if self.options.compile else "no",
            "note": note,
            **self.about,
        }
        self.rows[row_key(row)] = row
        said = "  ".join(f"{key} {value}" for key, value in shown.items() if value)
        print(f"{what:38} {tower:9} {size:9,} pairs  {seconds:8.3f} s  {said}  {note}", flush=True)
        write_rows(list(self.rows.values()), self.options.results / "image_train.csv")


def row_key(row: dict[str, Any]) -> tuple[str, ...]:
    """The key that identifies the measurement of a row."""
    return tuple(str(row[name]) for name in ("part", "image_tower", "pairs", "compiled"))


def describe_plan(run: Run) -> str:
    """Describe the memory plan."""
    graphs, sizes = run.step.graphs, run.batch.micro_batch_tokens
    return (
        f"micro-batches of {graphs.micro_batch_tokens} tokens; {graphs.kept(sizes)} of {len(sizes)} keep their graphs"
    )


if __name__ == "__main__":
    main()
