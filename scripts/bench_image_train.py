"""Training steps on pictures and texts beside what their towers alone take; locked image towers beside encoding anew.

    python scripts/bench_image_train.py --commit HASH                 one H200, under 6 minutes
    python scripts/bench_image_train.py --parts whole --keep-rows     and a million pairs through both towers
    python scripts/bench_image_train.py --device cpu --quick          tiny sizes, to see that everything runs

Pixels and texts are SYNTHETIC: random bytes in the host's memory, random token ids of lengths like those of web
captions; decoding is measured by bench_images.py. Weights are random, which costs what trained ones cost.

Each comparison in one process on the same batch:
- train: the loss with its gradients, on embeddings of that batch's shape; a whole step (`TrainStep`: pixels from the
  host, gradient cache, loss, clipping, optimizer); and the towers' own forward, backward and second forward of the same
  micro-batches with the pixels already on the device, and no loss;
- lit: a step with a locked image tower (LiT) on features computed before, beside the same step and one forward of
  every picture through the image encoder. (A gradient cache without features would encode each picture twice.)
- million: such a step of a million pairs: features, token ids, embeddings and their gradients wait on the host;
- whole: a step of a million pairs from pixels, both towers learning, all of that on the host. 65,536 pictures stand for
  the million, sixteen times over: as many bytes are copied to the device, and an eighth of the host's memory suffices.
Rows go to image_train.csv in scripts/results or where --results says, each as soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine

from index.files import atomic_path
from losses import InfCLLoss
from retriever.config.images import ImageConfig
from retriever.config.run import LossConfig, ModelConfig, OptimConfig, TrainConfig
from retriever.data.images.batches import ImageGroup
from retriever.data.length_sorting import pack
from retriever.data.micro_batches import PreparedBatch, TextGroup
from retriever.models.images.towers import ImageTextTowers, build_image_text_towers
from retriever.models.memory import GraphMemory
from retriever.models.mixed_precision import arithmetic
from retriever.models.tokenizer import TokenizedTexts
from retriever.training.memory_plan import plan_step
from retriever.training.optim import build_optimizer
from retriever.training.step import MicroBatch, TrainStep
from retriever.utils.device import Precision, autocast, to_device

MIB = 2**20
# OpenAI CLIP's text tower beside ViT-B/16 (arXiv 2103.00020, table 20), as a BERT: attention both ways.
TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
WORDS, LONGEST = 49408, 77
# Seconds that the parts after `train` take, on one H200.
ROOM_FOR_OTHERS = 110


def main() -> None:
    """Measure every part for which there is time, and write after each."""
    options = parse_arguments()
    bench = Bench(options)
    parts = {"train": bench.train, "lit": bench.locked, "million": bench.million, "whole": bench.whole}
    for name in options.parts:
        parts[name]()
        release()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    names = ("train", "lit", "million", "whole")
    parser.add_argument("--parts", nargs="+", choices=names, default=["train", "lit", "million"])
    parser.add_argument("--tower", default="ViT-B/16", help="image tower that learns at --batch")
    parser.add_argument("--locked", nargs="+", default=["ViT-B/16"], help="image towers that are locked")
    parser.add_argument("--largest", default="ViT-B/32", help="image tower that learns at --million")
    parser.add_argument("--batch", type=int, default=65536, help="pairs a step")
    parser.add_argument("--million", type=int, default=2**20, help="pairs of the largest steps")
    parser.add_argument("--rounds", type=int, default=2, help="of step and towers alone, where there is time")
    parser.add_argument("--compile", action="store_true", help="towers' layers by torch.compile")
    parser.add_argument("--budget", type=float, default=330, help="seconds in all; what has no room is left out")
    parser.add_argument("--keep-rows", action="store_true", help="add to the rows that the file has")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches")
    options = parser.parse_args()
    if options.quick:
        options.tower, options.locked, options.largest = "tiny", ["tiny"], "tiny"
        options.batch, options.million = 32, 64
    return options


@dataclass(frozen=True)
class Run:
    """Towers with all that a step needs, and a batch for it."""

    step: TrainStep
    batch: PreparedBatch
    planned_mib: float
    """Peak that `retriever train --dry-run` would tell."""
    a_pair: float
    """Seconds of a pair in a step of few, which keeps most of its graphs."""

    @property
    def towers(self) -> Any:
        """The ImageTextTowers."""
        return self.step.towers

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Of both towers."""
        return [MicroBatch(group, rows) for group in self.batch.groups for rows in group.micro_batches]

    def made(self) -> Callable[[], Any]:
        """One whole step."""
        return lambda: self.step(self.batch, 0)

    def alone(self) -> None:
        """The towers' own forward, backward and second forward, micro-batch by micro-batch."""
        with arithmetic(self.towers, self.step.precision):
            for again in (False, True):
                for micro in self.micro_batches:
                    with torch.set_grad_enabled(again):
                        embeddings = micro.group.embed(self.towers, micro.rows)
                    if again:
                        embeddings.backward(torch.full_like(embeddings, 1e-3))
        self.towers.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Timed:
    """One call."""

    seconds: float
    peak_mib: float
    """Of torch's allocator; 0 on a CPU."""


class Bench:
    """Rows in the making."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.precision: Precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.started = time.monotonic()
        self.about = {**machine(), "precision": self.precision, "data": "synthetic pixels and token ids"}
        if options.commit:
            self.about["commit"] = options.commit
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        known = options.results / "image_train.csv"
        if options.keep_rows and known.exists():
            with known.open(encoding="utf-8", newline="") as stream:
                self.rows = {of_row(row): row for row in csv.DictReader(stream)}
        self._pixels: torch.Tensor | None = None

    def train(self) -> None:
        """Both towers learn: the loss alone, then a whole step and the towers alone, in turns."""
        name, size = self.options.tower, self.options.batch
        run = self.run(name, size, lock=False)
        # First, so that a step meets no kernel that has still to be compiled for this size.
        alone = self.loss_alone(run)
        loss = statistics.median([self.timed(alone).seconds for _ in range(6)][1:])
        steps: list[Timed] = []
        towers: list[Timed] = []
        for number in range(self.options.rounds):
            if number and self.left() < 1.2 * (steps[0].seconds + towers[0].seconds) + ROOM_FOR_OTHERS:
                print("no time left for another round", flush=True)
                break
            steps.append(self.timed(run.made()))
            step = statistics.median(each.seconds for each in steps)
            peak = max(each.peak_mib for each in steps)
            note = f"{plan_of(run)}; {len(steps)} measured"
            self.row("step", name, size, step, peak_mib=peak, planned_mib=run.planned_mib, note=note)
            self.row("loss and its gradients", name, size, loss, of_step=loss / step)
            on_device = replace(run, batch=on(run.batch, self.device))
            towers.append(self.timed(on_device.alone))
            del on_device
            bare = statistics.median(each.seconds for each in towers)
            ratio = statistics.median(s.seconds / t.seconds for s, t in zip(steps, towers, strict=True))
            self.row("towers: forward, backward, forward", name, size, bare, step_over_this=ratio)

    def locked(self) -> None:
        """A step on features, beside encoding every picture in it."""
        size = self.options.batch
        for name in self.options.locked:
            run = self.run(name, size, lock=True)
            steps = [self.timed(run.made()) for _ in range(4)][1:]
            step, peak = statistics.median(each.seconds for each in steps), max(each.peak_mib for each in steps)
            self.row(
                "LiT step on features", name, size, step, peak_mib=peak, planned_mib=run.planned_mib, note=plan_of(run)
            )
            if self.left() < 60:
                print(f"{name}: no time left to encode its pictures", flush=True)
                continue
            pixels = self.pixels(run.towers, size)
            self.encode(run, pixels[:4096])
            anew = step + self.timed(partial(self.encode, run, pixels)).seconds
            self.row("LiT step that encodes its pictures", name, size, anew, times_features=anew / step)
            del run
            release()

    def million(self) -> None:
        """A step on features of as many pairs as the method's largest runs."""
        self.largest("LiT step on features, data offload", self.options.locked[0], lock=True)

    def whole(self) -> None:
        """A step of as many pairs from pixels."""
        self.largest("step, data offload", self.options.largest, lock=False)

    def largest(self, what: str, name: str, *, lock: bool) -> None:
        """One step of --million pairs that has all of its data on the host."""
        size = self.options.million
        run = self.run(name, size, lock=lock, offload=True)
        # Few pairs keep their graphs, which spares a forward of four, and have next to no loss: at most about that.
        needed = 1.6 * size * run.a_pair
        if self.left() < needed:
            print(f"{what}, {name}: needs about {needed:.0f} s, {self.left():.0f} s are left", flush=True)
            return
        step = self.timed(run.made())
        self.row(
            *(what, name, size, step.seconds),
            peak_mib=step.peak_mib,
            planned_mib=run.planned_mib,
            note=f"{plan_of(run)}; host memory {psutil.Process().memory_info().rss / MIB:.0f} MiB",
        )

    def run(self, name: str, size: int, *, lock: bool, offload: bool = False) -> Run:
        """Towers, and a batch of pixels, or of features for a locked image tower."""
        towers = build(name, lock).to(self.device)
        if self.device.type == "cuda" and not towers.drop_padding():
            sys.exit("the text tower must run without padding")
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
        # Kernels are compiled and chosen, and memory is taken, on a small batch first.
        warm = [self.timed(lambda: step(few, 0)) for _ in range(2)][-1]
        return Run(step, batch, plan.peak / MIB, warm.seconds / few.queries)

    def batch(self, towers: ImageTextTowers, size: int, budget: int, *, lock: bool) -> PreparedBatch:
        """Random pictures (or features of them) and texts, cut into micro-batches as a run cuts its own."""
        tokens = made_texts(size)
        content = torch.randn(size, towers.image_width).half() if lock else self.pixels(towers, size)
        each = 1 if lock else towers.image_tokens
        at_once = min(max(1, budget // each), len(content))
        places = [np.arange(first, min(first + at_once, size)) for first in range(0, size, at_once)]
        images = ImageGroup(content, each, places) if lock else Pictures(content, each, places, size)
        padded = not towers.padding_free
        texts = TextGroup("document", tokens, pack(tokens.lengths, budget, padded=padded, device=towers.device.type))
        return PreparedBatch([images, texts], size, None, padded)

    def pixels(self, towers: ImageTextTowers, size: int) -> torch.Tensor:
        """Random bytes in the host's memory, made once: uint8 [at most --batch, 3, height, width]."""
        shape = (min(size, self.options.batch), 3, *towers.transform.size)
        if self._pixels is None or len(self._pixels) < shape[0]:
            self._pixels = torch.empty(shape, dtype=torch.uint8)
            # One block of them over and over: the device reads each from where it lies.
            block = torch.randint(0, 256, (min(shape[0], 512), *shape[1:]), dtype=torch.uint8)
            for part in self._pixels.split(len(block)):
                part.copy_(block[: len(part)])
        return self._pixels[: shape[0]]

    def loss_alone(self, run: Run) -> Callable[[], None]:
        """The loss and its gradients at random embeddings of unit length."""
        shape = (len(run.batch.groups[0]), run.towers.dimension)
        made = [torch.nn.functional.normalize(torch.randn(shape, device=self.device), dim=1) for _ in range(2)]

        def once() -> None:
            query, passage = (each.clone().requires_grad_() for each in made)
            with autocast(self.device, self.precision):
                run.step.loss(query, passage).backward()
            run.step.loss.zero_grad(set_to_none=True)

        return once

    def encode(self, run: Run, pixels: torch.Tensor) -> None:
        """Every picture once through the locked encoder, from the host's memory."""
        at_once = max(1, 131072 // run.towers.image_tokens)
        with arithmetic(run.towers, self.precision), torch.inference_mode():
            for part in pixels.split(at_once):
                run.towers.image_features(to_device(part, run.towers.device))

    def timed(self, call: Callable[[], Any]) -> Timed:
        """What one call takes. The allocator keeps what it has, as it does from step to step."""
        gc.collect()
        wait(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        wait(self.device)
        seconds = time.perf_counter() - start
        return Timed(seconds, torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else 0.0)

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.options.budget - (time.monotonic() - self.started))

    def row(self, what: str, tower: str, size: int, seconds: float, **more: Any) -> None:
        """Keep, print and write a row, in place of an earlier one of the same."""
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
        self.rows[of_row(row)] = row
        said = "  ".join(f"{key} {value}" for key, value in shown.items() if value)
        print(f"{what:38} {tower:9} {size:9,} pairs  {seconds:8.3f} s  {said}  {note}", flush=True)
        with atomic_path(self.options.results / "image_train.csv") as path, path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(row), lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows.values())


def of_row(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(str(row[name]) for name in ("part", "image_tower", "pairs", "compiled"))


def build(name: str, lock: bool) -> ImageTextTowers:
    """New towers with random weights and a tokenizer without words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special.values())}, unk_token="<unk>"))
    text = TEXT if name != "tiny" else {**TEXT, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LONGEST, **special).save_pretrained(folder)
        return build_image_text_towers(
            ModelConfig(
                architecture={"model_type": "bert", **text, "vocab_size": WORDS, "max_position_embeddings": LONGEST},
                tokenizer=folder,
                pooling="mean",
                projection=512,
                dropout=0.0,
                image=ImageConfig(name=name, lock="image" if lock else "none"),
            )
        )


def made_texts(size: int) -> TokenizedTexts:
    """Random token ids in the lengths of web captions: a dozen words or so, some of them long."""
    chance = np.random.default_rng(0)
    # CC3M has 10 words a caption, LAION-400M 9 (arXiv 2111.02114).
    lengths = np.clip(chance.lognormal(np.log(14), 0.5, size).round(), 4, LONGEST).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenizedTexts(chance.integers(4, WORDS, offsets[-1], dtype=np.int32), offsets)


@dataclass(frozen=True)
class Pictures(ImageGroup):
    """Some pictures that stand for more: each micro-batch is of as many bytes as it would be."""

    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def lengths(self) -> np.ndarray:
        """As of `ImageGroup`."""
        return np.full(self.count, self.tokens_each, dtype=np.int64)

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> torch.Tensor:
        """As of `ImageGroup`."""
        first = int(rows[0]) % (len(self.pixels) - len(rows) + 1)
        pixels = self.pixels[first : first + len(rows)]
        # Those on the device already need not be copied.
        return towers.embed_pixels(pixels) if pixels.device.type == "cpu" else towers({"pixels": pixels})


def on(batch: PreparedBatch, device: torch.device) -> PreparedBatch:
    """The batch with its pixels on the device."""
    images, texts = batch.groups
    assert isinstance(images, Pictures)
    return replace(batch, groups=[replace(images, pixels=images.pixels.to(device)), texts])


def plan_of(run: Run) -> str:
    """What the plan said."""
    graphs, sizes = run.step.graphs, run.batch.micro_batch_tokens
    return (
        f"micro-batches of {graphs.micro_batch_tokens} tokens; {graphs.keep(sizes)} of {len(sizes)} keep their graphs"
    )


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
