"""Training loss of `retriever train`, step by step, against a plain PyTorch loop over the same batches.

    python scripts/benchmarks/retriever/bench_loss_curve.py --device cuda
    python scripts/benchmarks/retriever/bench_loss_curve.py --device cpu --batch 16

The plain loop embeds all queries in one padded batch and all passages in another, computes the full score matrix,
cross-entropy, one backward and AdamW, in fp32. `retriever train` splits the batch into micro-batches by tokens and uses
the gradient cache and the tiled loss; on a GPU also without padding, in fp32 and in bf16. Both train MiniLM on the
bundled WordNet pairs, without dropout, whose random masks would differ. Rows are written to loss_curve.csv and plotted
in loss_curve.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.batches import TrainingBatch
from retriever.models.modality import build_towers
from retriever.models.towers import Towers
from retriever.training.trainer import Trainer
from retriever.utils.device import Precision
from scripts import DATA, RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import read_rows, update_rows
from scripts.benchmarks.retriever.bench_train import silence_output

WORDNET = DATA / "wordnet"
PLAIN = "plain"
LOGIT_SCALE, LR = 20.0, 5e-5


def main() -> None:
    """Train with both loops, compare them, and write the rows and the plot."""
    options = parse_arguments()
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if options.device.startswith("cuda") else ("fp32",)
    curves: dict[str, list[float]] = {}
    for precision in precisions:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer = begin(options, precision, Path(folder) / "run")
            if not curves:
                curves[PLAIN] = plain(trainer, options.device)
                print(f"{PLAIN}: {time.perf_counter() - start:.0f} s", flush=True)
                start = time.perf_counter()
            with silence_output():
                trainer.train()
            lines = (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            curves[f"ours, {precision}"] = [json.loads(line)["loss"] for line in lines]
        name = f"ours, {precision}"
        print(f"{name}: {time.perf_counter() - start:.0f} s; {compared(curves[name], curves[PLAIN])}", flush=True)
    rows = [
        {"step": step + 1, PLAIN: f"{curves[PLAIN][step]:.9f}"}
        | {f"ours, {p}": f"{curves[f'ours, {p}'][step]:.9f}" if p in precisions else "" for p in ("fp32", "bf16")}
        | {"batch": options.batch, **machine(options.commit)}
        for step in range(len(curves[PLAIN]))
    ]
    update_rows(rows, options.results / "loss_curve.csv", key=["hardware"])
    draw(options.results)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pairs per step (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for loss_curve.csv and the plot (default: %(default)s)"
    )
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def begin(options: argparse.Namespace, precision: Precision, run: Path) -> Trainer:
    """Start the run of `retriever train` that is compared."""
    config = TrainConfig(
        out=str(run),
        model=ModelConfig(name=options.model, dropout=0.0),
        data=DataConfig(sources=(SourceConfig(path=str(WORDNET)),)),
        loss=LossConfig(logit_scale=LOGIT_SCALE, precision="fp32" if precision == "fp32" else "auto"),
        optim=OptimConfig(lr=LR, weight_decay=0.0, schedule="constant", warmup_fraction=0.0),
        batch_size=options.batch,
        steps=options.steps,
        device=options.device,
        precision=precision,
        # Two or three micro-batches per step.
        micro_batch_tokens=8 * options.batch,
        log_every=1,
        checkpoint_every=10**6,
    )
    with silence_output():
        return Trainer.start(config, Terminal())


def plain(trainer: Trainer, device: str) -> list[float]:
    """Losses of the plain PyTorch loop over the trainer's batches, from the same initial weights."""
    towers = build_towers(trainer.config.model).to(device)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=LR, weight_decay=0.0)
    losses: list[Tensor] = []
    for step in range(len(trainer.batches)):
        batch = trainer.batches.batch(step)
        query, passage = (padded(towers, texts) for texts in (batch.queries, batch.passages))
        loss = cross_entropy(scores(query, passage, batch), torch.arange(len(query), device=device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def padded(towers: Towers, texts: list[str]) -> Tensor:
    """Embeddings [texts, D] of all texts in one padded batch, by sentence-transformers' modules."""
    features = {
        name: value.to(towers.device)
        for name, value in towers.model.preprocess(texts).items()
        if isinstance(value, Tensor)
    }
    return towers.model(features)["sentence_embedding"]


def scores(query: Tensor, passage: Tensor, batch: TrainingBatch) -> Tensor:
    """Scores [M, N] in which the other positives of a query are masked."""
    assert batch.false_negatives is not None
    same = torch.from_numpy(batch.false_negatives.query_ids[:, None] == batch.false_negatives.passage_ids)
    same[torch.from_numpy(batch.false_negatives.excluded).unbind(1)] = True
    same.fill_diagonal_(False)
    return (LOGIT_SCALE * query @ passage.T).masked_fill(same.to(query.device), -math.inf)


def compared(found: list[float], expected: list[float]) -> str:
    """Describe the difference of two curves."""
    apart = torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)
    return f"largest difference from the plain loss {apart.abs().max():.2e}, mean difference {apart.mean():+.2e}"


def draw(results: Path) -> None:
    """Draw loss_curve.png: for each hardware the curves, and below them the differences from the plain loop."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(results / "loss_curve.csv")
    machines = list(dict.fromkeys(row["hardware"] for row in rows))
    figure = Figure(figsize=(6.4 * len(machines), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(machines), sharex="col", squeeze=False, height_ratios=(2, 1))
    for column, name in enumerate(machines):
        own: list[dict[str, Any]] = [row for row in rows if row["hardware"] == name]
        steps = [int(row["step"]) for row in own]
        reference = [float(row[PLAIN]) for row in own]
        upper, lower = axes[0][column], axes[1][column]
        upper.plot(steps, reference, color="black", lw=3, alpha=0.35, label=f"{PLAIN}: padded, fp32")
        for color, curve in (("C0", "ours, fp32"), ("C1", "ours, bf16")):
            if own[0][curve]:
                losses = [float(row[curve]) for row in own]
                upper.plot(steps, losses, color=color, lw=1, label=curve)
                lower.plot(steps, [a - b for a, b in zip(losses, reference, strict=True)], color=color, lw=1)
        upper.set(title=f"{name}, batch {own[0]['batch']}", ylabel="loss")
        upper.legend()
        lower.set(xlabel="step", ylabel="ours - plain")
        for each in (upper, lower):
            each.grid(alpha=0.25)
    figure.savefig(results / "loss_curve.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
