"""Passages of the last steps as further negatives (cross-batch memory, arXiv 1912.06798), on the bundled WordNet.

    python scripts/benchmarks/retriever/bench_cross_step.py --device cuda
    python scripts/benchmarks/retriever/bench_cross_step.py --device cpu --passages 5000 --steps 200 --batch 128

Every run trains MiniLM with the same batches and steps. "none" has the negatives of the batch alone. The others add the
passage embeddings of the last steps, as they were computed then, without gradients: all passages of the batch have
gradients as always, positives and negatives. Known positives are masked among the older passages, too. "late" runs
begin to use them after half of the steps, when the weights move slowly; their learning rate is the same. "random
passages" has as many further negatives as the shortest memory, drawn from the corpus and embedded at each step.

Rows are written to cross_step.csv after each run, with nDCG@10 on the dev queries, and the mean cosine between the
embeddings of the oldest step of the memory at the end and those that the trained model computes of the same passages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from index.progress import SilentReporter
from losses import Negatives
from retriever.config.yaml_file import config_from_mapping
from retriever.data.batches import PoolTexts, TrainingBatch
from retriever.data.false_negatives import Integers
from retriever.data.known_positives import KnownPositives, text_digests
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.model import Model
from retriever.training.components import build_components
from retriever.training.objective.options import LossOptions
from scripts import DATA, RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.budget import Budget
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever.bench_nested_training import first_passages
from scripts.benchmarks.retriever.bench_train import silence_output

KEY = ("run", "seed", "hardware", "passages", "steps", "batch", "lr")


class Variant(NamedTuple):
    """A run of the comparison."""

    memory: int = 16
    """Number of steps whose passages are kept."""
    start: float = 0.0
    """Share of all steps after which they are negatives."""
    random: int = 0
    """Number of random passages, as a multiple of the batch size."""


NEVER = 1.0
RUNS = {
    "none": Variant(start=NEVER),
    "last 4 steps": Variant(memory=4),
    "last 16 steps": Variant(),
    "last 16 steps, late": Variant(start=0.5),
    "random passages, 4 batches": Variant(start=NEVER, random=4),
}


def main() -> None:
    """Train with and without older passages, evaluate, and write the rows."""
    options = parse_arguments()
    facts = machine(options.commit)
    with tempfile.TemporaryDirectory() as folder:
        data = first_passages(options.passages, Path(folder) / "data") if options.passages else DATA / "wordnet"
        runs = [(name, seed) for seed in range(options.seeds) for name in options.rows]
        budget = Budget(options.budget, len(runs), options.steps * options.batch, options.device)
        for name, seed in runs:
            if not budget.allows(f"{name}, seed {seed}"):
                return
            with silence_output():
                row = measured(name, seed, options, data, Path(folder))
            common = {"passages": options.passages, "steps": options.steps, "batch": options.batch, "lr": options.lr}
            row = {"run": name, "seed": seed, **row, **common, **facts}
            update_rows([row], options.results / "cross_step.csv", key=KEY)
            budget.count(f"{name}, seed {seed}: dev nDCG@10 {row['dev_ndcg@10']}, loss {row['loss']}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=0, help="first passages of the corpus; 0: all (default)")
    parser.add_argument("--rows", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs (default: all)")
    parser.add_argument("--budget", type=float, default=85, help="seconds in which the runs must end (default: 85)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cross_step.csv")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


class TextKeeper:
    """Prepares a batch and keeps its texts. Only for batches that are loaded in this process."""

    def __init__(self, prepare: Any) -> None:
        self._prepare = prepare
        self.texts: deque[PoolTexts] = deque()

    def __call__(self, batch: TrainingBatch) -> PreparedBatch:
        self.texts.append(batch.texts)
        prepared: PreparedBatch = self._prepare(batch)
        return prepared


class OlderPassages:
    """Adds the passages of earlier steps to the negatives of a step. Takes the place of `TrainStep.stored`.

    Args:
        memory: Number of steps whose passages are kept.
        start: First step that uses them.
        keeper: Has the texts of the batches, in order.
        known: The positives of queries that have several.
    """

    teacher = None
    frozen = None

    def __init__(self, memory: int, start: int, keeper: TextKeeper, known: KnownPositives | None) -> None:
        self._start, self._keeper, self._known, self._step = start, keeper, known, 0
        self.memory: deque[tuple[Sequence[str], Integers, Tensor]] = deque(maxlen=memory)
        """Texts, their digests and embeddings, the oldest step first."""

    def apply(
        self, batch: PreparedBatch, options: LossOptions, query: Tensor, passage: Tensor, ranks: Ranks
    ) -> tuple[Tensor, LossOptions, None]:
        """Add the older passages, and keep those of this step for the next ones."""
        texts = self._keeper.texts.popleft()
        digests = text_digests(texts.passages)
        if self.memory and self._step >= self._start:
            older = np.concatenate([kept for _, kept, _ in self.memory])
            pairs = self._positives(text_digests(texts.queries), digests[: batch.queries], older)
            negatives = Negatives(
                frozen=torch.cat([embeddings for *_, embeddings in self.memory]),
                frozen_excluded=torch.from_numpy(pairs).to(query.device) if len(pairs) else None,
            )
            options = dataclasses.replace(options, negatives=negatives)
        self.memory.append((texts.passages, digests, passage.detach().clone()))
        self._step += 1
        return passage, options, None

    def _positives(self, queries: Integers, positives: Integers, older: Integers) -> Integers:
        """Pairs [R, 2] of a query and an older passage that is a positive of it."""
        which, wanted = np.arange(len(queries)), positives
        if self._known is not None:
            of_query, known = self._known.positives_of(queries)
            which, wanted = np.concatenate([which, of_query]), np.concatenate([wanted, known])
        order = np.argsort(older, kind="stable")
        first, last = np.searchsorted(older[order], wanted), np.searchsorted(older[order], wanted, side="right")
        pairs = [(query, row) for query, a, b in zip(which, first, last, strict=True) for row in order[a:b]]
        return np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)


def measured(name: str, seed: int, options: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Train a run and return the columns of its row."""
    variant, out = RUNS[name], folder / f"{list(RUNS).index(name)}-{seed}"
    random: dict[str, Any] = {}
    if variant.random:
        random = {"random_passages": variant.random * options.batch, "corpus": str(data)}
    config = {
        "out": str(out),
        "model": {"name": options.model},
        "data": {"sources": [{"path": str(data)}], "cache": str(folder / "cache"), **random},
        "optim": {"lr": options.lr},
        "batch_size": options.batch,
        "steps": options.steps,
        "device": options.device,
        "seed": seed,
    }
    parts = build_components(config_from_mapping(config), out, SilentReporter(), Ranks())
    keeper = TextKeeper(parts.batches.prepare)
    parts.batches.prepare = keeper
    start = options.steps + 1 if variant.start == NEVER else int(variant.start * options.steps)
    older: Any = OlderPassages(variant.memory, start, keeper, parts.batches.known)
    train_step = dataclasses.replace(parts.train_step, stored=older)
    parts.towers.train()
    began = time.perf_counter()
    losses = [train_step(batch, step).loss for step, batch in enumerate(parts.batches.loader())]
    last = torch.stack(losses[-10:]).mean().item()
    seconds = time.perf_counter() - began
    parts.towers.eval()
    model = Model("the model of the run", parts.towers, EncodeOptions(parts.precision))
    texts, _, stale = older.memory[0]
    now = model.encode_passages(texts)
    cosine = np.mean(np.sum(now * stale.float().cpu().numpy(), axis=1))
    report = retriever.evaluate(model, data, split="dev", k=100)
    return {
        "dev_ndcg@10": f"{report.metrics['ndcg@10']:.4f}",
        "loss": f"{last:.4f}",
        "oldest_cosine": f"{cosine:.4f}",
        "seconds": f"{seconds:.1f}",
    }


if __name__ == "__main__":
    main()
