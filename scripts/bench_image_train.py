"""Training steps on pictures and texts beside what their towers alone take; locked image towers beside encoding anew.

    python scripts/bench_image_train.py --commit HASH                 one H200, under 6 minutes
    python scripts/bench_image_train.py --device cpu --quick          tiny sizes, to see that everything runs

Pixels and texts are SYNTHETIC: random bytes in the host's memory, random token ids of lengths like those of web
captions; decoding is measured by bench_images.py. Weights are random, which costs what trained ones cost.

Three comparisons, each in one process on the same batch:
- a whole step (`TrainStep`: pixels from the host, gradient cache, loss, clipping, optimizer) beside the towers' own
  forward, backward and second forward of the same micro-batches with the pixels already on the device, and no loss;
- the loss with its gradients, on embeddings of that batch's shape, beside the whole step;
- a step with a locked image tower (LiT) on features computed before, beside the same step and one forward of every
  picture through the image encoder. (A gradient cache without features would encode each picture twice.)
Rows go to image_train.csv in scripts/results or where --results says.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine

from index.files import atomic_path
from losses import InfCLLoss
from retriever.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from retriever.device import Precision, autocast, to_device
from retriever.graph_memory import GraphMemory
from retriever.half_weights import arithmetic
from retriever.images.batches import ImageGroup
from retriever.images.config import ImageConfig
from retriever.images.towers import ImageTextTowers, build_image_text_towers
from retriever.optim import build_optimizer
from retriever.packing import pack
from retriever.plan import plan_step
from retriever.prepare import PreparedBatch, TextGroup
from retriever.step import MicroBatch, TrainStep
from retriever.tokens import TokenizedTexts

MIB = 2**20
# OpenAI CLIP's text tower beside ViT-B/16 (arXiv 2103.00020, table 20), as a BERT: attention both ways.
TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
WORDS, LONGEST = 49408, 77


def main() -> None:
    """Measure every part for which there is time, and write after each."""
    options = parse_arguments()
    bench = Bench(options)
    parts = {"train": bench.train, "lit": bench.locked, "million": bench.million}
    for name in options.parts:
        parts[name]()
        release()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--parts", nargs="+", choices=("train", "lit", "million"), default=["train", "lit", "million"])
    parser.add_argument("--tower", default="ViT-B/16", help="image tower of the whole step")
    parser.add_argument("--locked", nargs="*", default=["ViT-B/16", "ViT-L/16"], help="image towers that are locked")
    parser.add_argument("--batch", type=int, default=65536, help="pairs a step")
    parser.add_argument("--million", type=int, default=2**20, help="pairs of the largest step, on features")
    parser.add_argument(
        "--steps", type=int, default=1, help="measured after one of over 10 s that counts too; of locked towers three"
    )
    parser.add_argument("--compile", action="store_true", help="towers' layers by torch.compile")
    parser.add_argument("--budget", type=float, default=330, help="seconds in all; what is left then is left out")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches")
    options = parser.parse_args()
    if options.quick:
        options.tower, options.locked, options.batch, options.million = "tiny", ["tiny"], 32, 64
    return options


@dataclass(frozen=True)
class Run:
    """Towers with all that a step needs, and a batch for it."""

    step: TrainStep
    batch: PreparedBatch
    planned_mib: float
    """Peak that `retriever train --dry-run` would tell."""

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
        device = self.towers.device
        with arithmetic(self.towers, self.step.precision):
            for again in (False, True):
                for micro in self.micro_batches:
                    with torch.set_grad_enabled(again):
                        embeddings = micro.group.embed(self.towers, micro.rows)
                    if again:
                        embeddings.backward(torch.full_like(embeddings, 1e-3))
        self.towers.zero_grad(set_to_none=True)
        wait(device)


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
        self.rows: list[dict[str, Any]] = []

    def train(self) -> None:
        """Both towers learn: a whole step, the towers alone, the loss alone."""
        name, size = self.options.tower, self.options.batch
        run = self.run(name, size, lock=False)
        step, peak = self.timed(run.made(), self.options.steps)
        self.row("step", name, size, step, peak_mib=peak, planned_mib=run.planned_mib, note=plan_of(run))
        loss, _ = self.timed(self.loss_alone(run), 5)
        self.row("loss and its gradients", name, size, loss, of_step=loss / step)
        on_device = Run(run.step, on(run.batch, self.device), run.planned_mib)
        alone, _ = self.timed(on_device.alone, 1, warm=False)
        self.row("towers: forward, backward, forward", name, size, alone, step_over_this=step / alone)

    def locked(self) -> None:
        """A step on features, beside encoding every picture in it."""
        size = self.options.batch
        for name in self.options.locked:
            run = self.run(name, size, lock=True)
            step, peak = self.timed(run.made(), 3)
            self.row("LiT step on features", name, size, step, peak_mib=peak, planned_mib=run.planned_mib)
            if self.left() < 60:
                print(f"{name}: no time left to encode its pictures", flush=True)
                continue
            encode, _ = self.timed(partial(self.encode, run), 1, warm=False)
            anew = step + encode
            self.row("LiT step that encodes its pictures", name, size, anew, times_features=anew / step)
            del run
            release()

    def million(self) -> None:
        """A step on features of as many pairs as the method's largest runs: inputs wait in the host's memory."""
        name, size = self.options.locked[0], self.options.million
        if self.left() < 45:
            print(f"{size:,} pairs: no time left", flush=True)
            return
        run = self.run(name, size, lock=True)
        step, peak = self.timed(run.made(), 1, warm=False)
        self.row(
            "LiT step on features", name, size, step, peak_mib=peak, planned_mib=run.planned_mib, note=plan_of(run)
        )

    def run(self, name: str, size: int, *, lock: bool) -> Run:
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
        )
        loss = InfCLLoss(logit_scale=config.loss.logit_scale, learnable=True, symmetric=True).to(self.device)
        graphs = GraphMemory.plan(
            towers, self.precision, texts=2 * size, workspace_mib=config.loss.workspace_mib, micro_batch_tokens=None
        )
        modules = torch.nn.ModuleDict({"towers": towers, "loss": loss})
        optimizer = build_optimizer(modules.named_parameters(), config.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        step = TrainStep(config, self.precision, towers, loss, optimizer, scaler, graphs, 100)
        batch = make_batch(towers, size, graphs.micro_batch_tokens, features=lock)
        plan = plan_step(
            config, towers, loss, optimizer, graphs, batch, precision=self.precision, ranks=1, batches_waiting=1
        )
        run = Run(step, batch, plan.peak / MIB)
        # Kernels are chosen, and memory is taken, on a small batch first.
        TrainStep(config, self.precision, towers, loss, optimizer, scaler, graphs, 100)(
            make_batch(towers, min(size, 4096), graphs.micro_batch_tokens, features=lock), 0
        )
        return run

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

    def encode(self, run: Run) -> None:
        """Every picture once through the locked encoder, from the host's memory."""
        size = len(run.batch.groups[0])
        pixels, at_once = made_pixels(run.towers, size), max(1, 131072 // run.towers.image_tokens)
        wait(self.device)
        with arithmetic(run.towers, self.precision), torch.inference_mode():
            for first in range(0, size, at_once):
                run.towers.image_features(to_device(pixels[first : first + at_once], self.device))

    def timed(self, call: Callable[[], Any], times: int, *, warm: bool = True) -> tuple[float, float]:
        """Median seconds of a call, and the allocator's peak in MiB; calls for which no time is left are left out."""
        release()
        seconds: list[float] = []
        for number in range(times + warm):
            if seconds and self.left() < 2 * seconds[-1] + 30:
                break
            wait(self.device)
            start = time.perf_counter()
            call()
            wait(self.device)
            taken = time.perf_counter() - start
            if number or not warm or taken > 10:
                # A long first call is as warm as the next.
                seconds.append(taken)
        peak = torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else 0.0
        return statistics.median(seconds), peak

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.options.budget - (time.monotonic() - self.started))

    def row(self, what: str, tower: str, size: int, seconds: float, **more: Any) -> None:
        """Keep, print and write a row."""
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
        self.rows.append(row)
        said = "  ".join(f"{key} {value}" for key, value in shown.items() if value)
        print(f"{what:36} {tower:9} {size:9,} pairs  {seconds:8.3f} s  {said}  {note}", flush=True)
        with atomic_path(self.options.results / "image_train.csv") as path, path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(row), lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)


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


def make_batch(towers: ImageTextTowers, size: int, budget: int, *, features: bool) -> PreparedBatch:
    """Random pictures (or features of them) and texts, cut into micro-batches as a run cuts its own."""
    chance = np.random.default_rng(0)
    # Web captions: a dozen words or so, some of them long (CC3M 10 words, LAION-400M 9, arXiv 2111.02114).
    lengths = np.clip(chance.lognormal(np.log(14), 0.5, size).round(), 4, LONGEST).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = TokenizedTexts(chance.integers(4, WORDS, offsets[-1], dtype=np.int32), offsets)
    if features:
        pictures, each = torch.randn(size, towers.image_width).half(), 1
    else:
        pictures, each = made_pixels(towers, size), towers.image_tokens
    at_once = max(1, budget // each)
    places = [np.arange(first, min(first + at_once, size)) for first in range(0, size, at_once)]
    padded = not towers.padding_free
    groups = [
        ImageGroup(pictures, each, places),
        TextGroup("document", tokens, pack(tokens.lengths, budget, padded=padded)),
    ]
    ids = np.arange(size)
    return PreparedBatch(groups, size, ids, ids, padded)


def made_pixels(towers: ImageTextTowers, size: int) -> torch.Tensor:
    """Random bytes in the host's memory, one block of them over and over: uint8 [size, 3, height, width]."""
    block = torch.randint(0, 256, (min(size, 512), 3, *towers.transform.size), dtype=torch.uint8)
    pixels = torch.empty(size, *block.shape[1:], dtype=torch.uint8)
    for first in range(0, size, len(block)):
        pixels[first : first + len(block)] = block[: size - first]
    return pixels


def on(batch: PreparedBatch, device: torch.device) -> PreparedBatch:
    """The batch with its pixels on the device."""
    images, texts = batch.groups
    assert isinstance(images, ImageGroup)
    moved = OnDevice(images.pixels.to(device), images.tokens_each, images.micro_batches)
    return PreparedBatch([moved, texts], batch.queries, batch.query_ids, batch.passage_ids, batch.padded)


class OnDevice(ImageGroup):
    """Pictures that need not be copied."""

    def embed(self, towers: ImageTextTowers, rows: np.ndarray) -> torch.Tensor:
        """Embeddings [rows, dimension]."""
        embeddings: torch.Tensor = towers({"pixels": self.pixels[int(rows[0]) : int(rows[-1]) + 1]})
        return embeddings


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
    """Give memory back, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
