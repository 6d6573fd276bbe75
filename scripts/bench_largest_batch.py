"""The largest batch that one GPU trains on, by each way of computing the loss, found by trying whole optimizer steps.

python scripts/bench_largest_batch.py
python scripts/bench_largest_batch.py --device cpu --quick

Two towers of BERT-base's size with random weights, AdamW, bf16; texts of --tokens tokens. A batch is doubled until it
runs out of memory, then the last gap is halved --halvings times; ours stops at --goal. Token ids wait on the host and
micro-batches of them visit the GPU. Rows go to largest_batch.csv, memory against the batch to largest_batch.png, in
scripts/results or where --results says. A step that would probably end after --budget seconds is not begun, and has a
row that says so; the ways are tried in the order of what their figures are worth.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine

from index.files import atomic_path
from losses import InfCLLoss, clip_loss
from retriever.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from retriever.device import choose_precision
from retriever.graph_memory import GraphMemory
from retriever.model_folder import Side
from retriever.optim import build_optimizer
from retriever.packing import pack
from retriever.prepare import PreparedBatch, TextGroup
from retriever.step import TrainStep
from retriever.tokens import TokenizedTexts
from retriever.towers import Towers, build_towers

MIB = 2**20
VOCABULARY = 30522
# Of a step's time beside that of a smaller one: the loss's is a small part, but grows with the square.
GROWTH = 1.3
SIZES = {"bert-base": (768, 12, 12), "tiny": (32, 2, 2)}


class WholeMatrix(InfCLLoss):
    """CLIP's loss, whose matrix exists whole."""

    def forward(self, query: Tensor, passage: Tensor, **ids: Tensor) -> Tensor:
        """As its paper writes it."""
        return clip_loss(query, passage, logit_scale=self.logit_scale)


@dataclass(frozen=True)
class Way:
    """How a batch is trained on."""

    name: str
    loss: Callable[[], InfCLLoss]
    graphs: Callable[[GraphMemory], GraphMemory]
    on_host: bool = False
    """Whether embeddings and their gradients wait there too."""
    endless: bool = False
    """Whether to stop at the goal."""


WAYS = [
    Way("ours", lambda: InfCLLoss(symmetric=True), lambda planned: planned, endless=True),
    Way(
        "no gradient cache, whole matrix",
        WholeMatrix,
        lambda planned: GraphMemory(planned.micro_batch_tokens, 2**62),
    ),
    Way("gradient cache, whole matrix", WholeMatrix, lambda planned: GraphMemory(planned.micro_batch_tokens, 0)),
    Way(
        "ours, embeddings on the host",
        lambda: InfCLLoss(symmetric=True),
        lambda planned: planned,
        on_host=True,
        endless=True,
    ),
]


def main() -> None:
    """Try every way."""
    began = time.monotonic()
    options = arguments()
    bench = Bench(options, began + options.budget)
    for way in WAYS:
        if not options.ways or any(part in way.name for part in options.ways):
            bench.search(way)
    bench.write()
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--goal", type=int, default=2**20, help="pairs at which ours stops")
    parser.add_argument("--ways", nargs="*", help="those with one of these in their name")
    parser.add_argument("--halvings", type=int, default=2, help="of the gap between what fits and what does not")
    parser.add_argument("--budget", type=float, default=240, help="seconds in all; what is left then is left out")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    parser.add_argument("--quick", action="store_true", help="tiny towers and batches, to see that everything runs")
    return parser.parse_args()


class Bench:
    """Rows in the making."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.device = torch.device(options.device)
        self.goal = 256 if options.quick else options.goal
        self.here = machine() | ({"commit": options.commit} if options.commit else {})
        self.rows: list[dict[str, Any]] = []
        self.towers = towers_of("tiny" if options.quick else "bert-base", options.tokens).to(self.device)
        if self.device.type == "cuda":
            self.towers.drop_padding()
        self.parameters = sum(parameter.numel() for parameter in self.towers.parameters())

    def search(self, way: Way) -> None:
        """Double, then halve the gap; ours goes to the goal in fewer steps."""
        size, fits, fails, seconds = 64 if self.options.quick else 4096, 0, 0, 0.0
        # What kernels compile at their first run is no part of a step's time.
        self.attempt(way, size, counted=False)
        while size <= self.goal:
            if not self.time_for(way, size, GROWTH * seconds * size / max(1, fits)):
                break
            problem, seconds = self.attempt(way, size)
            if problem:
                fails = size
                break
            fits = size
            if size == self.goal:
                break
            size = min(size * (16 if way.endless else 2), self.goal)
        for _ in range(self.options.halvings if fails and fits else 0):
            middle = (fits + fails) // 2
            if not self.time_for(way, middle, GROWTH * seconds * 2):
                break
            problem, _ = self.attempt(way, middle)
            fits, fails = (fits, middle) if problem else (middle, fails)
        beyond = f", not {fails:,}" if fails else ": the goal" if fits == self.goal else ", no time for more"
        print(f"{way.name}: {fits:,} pairs{beyond}", flush=True)

    def time_for(self, way: Way, pairs: int, seconds: float) -> bool:
        """Whether a step of so many seconds ends in time; a row if not."""
        if time.monotonic() + seconds <= self.deadline:
            return True
        self.add_row(way, pairs, "no time left")
        return False

    def attempt(self, way: Way, pairs: int, counted: bool = True) -> tuple[str, float]:
        """Why an optimizer step does not fit, or nothing, and its seconds; a row."""
        self.reset()
        problem, seconds, loss = "", 0.0, float("nan")
        try:
            step, batch = self.prepared(way, pairs)
            self.wait()
            began = time.perf_counter()
            loss = float(step(batch, 0)[0])
            self.wait()
            seconds = time.perf_counter() - began
        except torch.OutOfMemoryError:
            problem = "out of memory"
        step = batch = None
        if not problem and not np.isfinite(loss):
            raise SystemExit(f"{way.name} at {pairs}: the loss is {loss}")
        if counted:
            self.add_row(way, pairs, problem, seconds, loss)
        return problem, seconds

    def add_row(self, way: Way, pairs: int, problem: str, seconds: float = 0.0, loss: float = 0.0) -> None:
        """A row of a step that was made, or could not be, with the memory that it took."""
        peak = torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else 0.0
        row = {
            "method": way.name,
            "pairs": pairs,
            "tokens": self.options.tokens,
            "parameters": self.parameters,
            "seconds": "" if problem else f"{seconds:.4g}",
            "peak_mib": "" if problem else f"{peak:.0f}",
            "loss": "" if problem else f"{loss:.5g}",
            "status": problem or "trained",
            **self.here,
        }
        self.rows.append(row)
        self.write()
        print(
            f"{way.name:<34}{pairs:>10,} pairs  {row['seconds'] or problem:>14} s {row['peak_mib']:>8} MiB",
            flush=True,
        )

    def prepared(self, way: Way, pairs: int) -> tuple[TrainStep, PreparedBatch]:
        """A step that has not been made, on random texts."""
        towers, precision = self.towers, choose_precision("auto", self.device)
        towers.train()
        loss = way.loss().to(self.device)
        config = TrainConfig(
            loss=LossConfig(symmetric=True),
            optim=OptimConfig(lr=1e-6),
            batch_size=pairs,
            offload_embeddings=way.on_host,
        )
        graphs = way.graphs(
            GraphMemory.plan(
                towers,
                precision,
                texts=2 * pairs,
                workspace_mib=config.loss.workspace_mib,
                micro_batch_tokens=None,
                offload_embeddings=way.on_host,
            )
        )
        optimizer = build_optimizer([*towers.named_parameters(), *loss.named_parameters()], config.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        sides: tuple[Side, Side] = ("query", "document")
        groups = [text_group(side, pairs, self.options.tokens, graphs, towers) for side in sides]
        ids = np.arange(pairs)
        batch = PreparedBatch(groups, pairs, ids, ids, not towers.padding_free)
        return TrainStep(config, precision, towers, loss, optimizer, scaler, graphs, 1), batch

    def reset(self) -> None:
        """Leave nothing of the step before."""
        self.towers.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self) -> None:
        """Table and plot so far."""
        folder = self.options.results
        with atomic_path(folder / "largest_batch.csv") as path, path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, self.rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        draw(self.rows, folder / "largest_batch.png")


def text_group(side: Side, pairs: int, tokens: int, graphs: GraphMemory, towers: Towers) -> TextGroup:
    """Random texts of one length for one tower."""
    chance = np.random.default_rng(len(side))
    ids = chance.integers(5, VOCABULARY, pairs * tokens, dtype=np.int32)
    texts = TokenizedTexts(ids, np.arange(pairs + 1, dtype=np.int64) * tokens)
    return TextGroup(side, texts, pack(texts.lengths, graphs.micro_batch_tokens, padded=not towers.padding_free))


def towers_of(size: str, tokens: int) -> Towers:
    """Two BERTs with random weights; their tokenizer is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    width, layers, heads = SIZES[size]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names.values())}, unk_token="[UNK]"))
    architecture = {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        torch.manual_seed(0)
        return build_towers(
            ModelConfig(architecture=architecture, tokenizer=folder, shared=False, max_length=max(tokens, 16))
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory of the steps that fitted, a cross where one did not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="pairs in the batch", ylabel="peak memory of a step, GiB")
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        fitted = sorted(
            (row["pairs"], float(row["peak_mib"]) / 1024) for row in rows if row["method"] == name and row["loss"]
        )
        failed = [row["pairs"] for row in rows if row["method"] == name and row["status"] == "out of memory"]
        if fitted:
            axes.plot(*zip(*fitted, strict=True), "o-", color=f"C{number}", label=name)
        axes.plot(failed, [0] * len(failed), "x", color=f"C{number}", clip_on=False)
    axes.set_title(
        f"{rows[0]['hardware']}, {rows[0]['parameters'] / 1e6:.0f} M parameters (x: out of memory)", fontsize=9
    )
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
