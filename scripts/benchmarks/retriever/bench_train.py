"""Training throughput: `retriever train` against sentence-transformers' cached loss.

    python scripts/benchmarks/retriever/bench_train.py --device cuda --tokenizer FOLDER --batch 16384 65536
    python scripts/benchmarks/retriever/bench_train.py --device cpu --model FOLDER --batch 512

Without --model both train BERT-base with random weights. Both train the same model with AdamW on the same batches of
the same texts in the same order, after warm-up steps that are not counted. Our times include data loading; their texts
are tokenized before the clock starts.

sentence-transformers is measured at each of --their-tokens, with padding and, where flash-attention is installed,
without. Its best setting is the one compared. With a short --budget, larger batches are measured only at the settings
that were best at smaller ones, and with fewer steps.

Model FLOP utilization counts the matrix products of three forward passes per real token, without credit for padding or
recomputation, and divides by the rate of an 8192 × 8192 matrix product measured in the same run. The planned peak
memory is the one that `retriever train --dry-run` prints. Rows are written to train.csv as they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.models.modality import build_towers
from retriever.training.trainer import Trainer
from retriever.utils.device import Precision, autocast
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.timing import MIB, peak_mib, reset_peak_memory, synchronize
from scripts.datasets.sized_texts import SizedTexts

LR = 1e-5
PADDED = "sdpa"
# Our methods, and the option that each needs.
OUR_METHODS = {"ours": "", "ours, compiled": "compile", "ours, CUDA graphs": "cuda_graphs"}
# Shares of the remaining time for the steps of one batch size. The rest is for texts, loading and saving.
OUR_SHARE, THEIR_SHARE = 0.25, 0.7


def main() -> None:
    """Measure every batch size with both libraries and write the rows."""
    options = parse_arguments()
    budget = Budget(options.budget)
    device = torch.device(options.device)
    model = model_config(options)
    tokenizer = build_towers(model).tokenizer("query").tokenizer
    ceiling = product_rate(device)
    about = {**machine(options.commit), "product_tflops": round(ceiling, 1)}
    print(f"{about['hardware']}: matrix product {ceiling:.1f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(report(row, ceiling, about))
        update_rows(rows, options.results / "train.csv", key=["hardware"])
        return rows[-1]

    settings = [(attention, tokens) for attention in their_attention(device) for tokens in options.their_tokens]
    # Seconds per pair at the previous batch size, to fit the next one into the budget.
    our_pace = their_pace = 0.0
    for batch in sorted(options.batch):
        for method, option in OUR_METHODS.items():
            if option and not getattr(options, option):
                continue
            steps = budget.repeats(OUR_SHARE, our_pace * batch, least=4, most=options.steps)
            row, texts = ours(model, tokenizer, batch, steps, method, options)
            our_pace = 1 / keep(row)["pairs_per_second"]
        if not settings:
            continue
        repeats = budget.repeats(THEIR_SHARE, their_pace * batch, least=1, most=len(settings) * options.their_steps)
        settings = settings[:repeats]
        rates: dict[tuple[str, int], float] = {}
        for attention, tokens in settings:
            counted = max(1, repeats // len(settings) - warm_up(batch))
            try:
                row = sentence_transformers(model, texts[: warm_up(batch) + counted], tokens, options, attention)
            except torch.OutOfMemoryError:
                print(f"{their_name(attention, tokens)}, batch {batch}: out of memory", flush=True)
                continue
            rates[attention, tokens] = keep(row)["pairs_per_second"]
        settings = sorted(rates, key=lambda setting: -rates[setting])
        if not rates:
            continue
        their_pace = 1 / max(rates.values())
        most = max(row["pairs_per_second"] for row in rows if row["batch"] == batch)
        print(f"batch {batch}: {most * their_pace:.2f} times sentence-transformers", flush=True)
    print(f"{budget.spent():.0f} s in total", flush=True)


@dataclass(frozen=True)
class Budget:
    """Time budget of a whole benchmark in seconds, from its creation on; None for no limit."""

    seconds: float | None
    start: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left(self) -> float:
        """Remaining seconds, at least 0; infinite without a limit."""
        return math.inf if self.seconds is None else max(0.0, self.seconds - self.spent())

    def repeats(self, share: float, seconds: float, *, least: int, most: int) -> int:
        """Number of repeats of `seconds` each that fit a share of the remaining time.

        The result is between `least` and `most`; it is `most` without a limit or when `seconds` is 0 (unknown).
        """
        if not seconds or self.seconds is None:
            return most
        return min(most, max(least, int(share * self.left() / seconds)))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", default="", help="model folder (default: BERT-base with random weights)")
    parser.add_argument("--tokenizer", help="folder of a BERT tokenizer for BERT-base")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[16384, 65536], help="batch sizes in pairs (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=8, help="our steps, warm-up included (default: %(default)s)")
    parser.add_argument(
        "--their-steps",
        type=int,
        default=4,
        help="counted steps of sentence-transformers, after as many for warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--their-tokens",
        type=int,
        nargs="*",
        default=[16384, 65536],
        help="micro-batch sizes of sentence-transformers in tokens (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=8, help="our tokenizer processes (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, help="time limit in seconds, met by running fewer steps (default: none)"
    )
    parser.add_argument("--compile", action="store_true", help="also measure ours with torch.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="also measure ours with CUDA graphs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for train.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def model_config(options: argparse.Namespace) -> ModelConfig:
    """Configuration of the model that both libraries train."""
    if options.model:
        return ModelConfig(name=options.model, max_length=252)
    return ModelConfig(architecture={"model_type": "bert"}, tokenizer=options.tokenizer, pooling="mean", max_length=252)


def warm_up(batch: int) -> int:
    """Number of warm-up steps, for both libraries."""
    return 2 if batch < 16384 else 1


def ours(
    model: ModelConfig, tokenizer: Any, batch: int, steps: int, method: str, options: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[list[str], list[str]]]]:
    """Run `retriever train`. Returns a row from its metrics.jsonl, and the queries and positives of every step."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        SizedTexts(tokenizer).write_pairs(pairs, batch * min(steps, 4))
        config = TrainConfig(
            out=f"{folder}/run",
            model=model,
            data=DataConfig(sources=(SourceConfig(path=str(pairs)),), workers=options.workers),
            loss=LossConfig(logit_scale=20.0),
            optim=OptimConfig(lr=LR, schedule="constant", warmup_fraction=0.0),
            batch_size=batch,
            steps=steps,
            device=options.device,
            compile=OUR_METHODS[method] == "compile",
            cuda_graphs=OUR_METHODS[method] == "cuda_graphs",
            log_every=warm_up(batch),
            checkpoint_every=10**6,
        )
        reset_peak_memory()
        with silence_output():
            trainer = Trainer.start(config, Terminal())
            plan = trainer.plan()
            texts = [(b.queries, b.positives) for b in map(trainer.batches.batch, range(steps))]
            trainer.train()
        lines = (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines][1:]
        kept = trainer.graphs
    middle = {key: statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "pairs_per_second")}
    note = f"micro-batches of {kept.micro_batch_tokens} tokens, graphs of {kept.graph_tokens} tokens kept"
    row = {
        "method": method,
        "batch": batch,
        **middle,
        "peak_mib": peak_mib(),
        # On a CPU the plan covers the whole process, whose peak torch does not measure.
        "planned_mib": plan.peak / MIB if trainer.device.type == "cuda" else 0.0,
        "flops": flops(trainer.towers),
        "note": note,
    }
    return row, texts


def sentence_transformers(
    model: ModelConfig,
    texts: list[tuple[list[str], list[str]]],
    tokens: int,
    options: argparse.Namespace,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """Train on the given queries and positives with sentence-transformers' cached loss and micro-batches of `tokens`
    tokens. The texts are tokenized before the clock starts."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    towers = build_towers(model).to(options.device)
    network = with_attention(towers.model, attention)
    # On a CPU autocast would slow it down.
    precision: Precision = "bf16" if towers.device.type == "cuda" else "fp32"
    if precision == "bf16":
        # As in its own trainer, autocast wraps the forward, so that the recomputed one runs in bf16, too.
        network.forward = torch.autocast(towers.device.type, torch.bfloat16)(network.forward)
    loss = CachedMultipleNegativesRankingLoss(network, mini_batch_size=2048, mini_batch_num_tokens=tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, fused=True)
    batch = len(texts[0][0])
    seconds, counted = [], []
    reset_peak_memory()
    for number, columns in enumerate(texts):
        features = [network.preprocess(column) for column in columns]
        real = sum(their_tokens(each) for each in features)
        features = [{k: v.to(options.device) if hasattr(v, "to") else v for k, v in f.items()} for f in features]
        synchronize(towers.device)
        start = time.perf_counter()
        with autocast(towers.device, precision):
            value = loss(features, torch.empty(0))
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(towers.device)
        if number >= warm_up(batch):
            seconds.append(time.perf_counter() - start)
            counted.append(real)
    rates = [real / second for real, second in zip(counted, seconds, strict=True)]
    return {
        "method": their_name(attention, tokens),
        "batch": batch,
        "tokens_per_second": statistics.median(rates),
        "pairs_per_second": batch / statistics.median(seconds),
        "peak_mib": peak_mib(),
        "flops": flops(towers),
        "note": f"{precision}, cached loss",
    }


def their_name(attention: str, tokens: int) -> str:
    """Method name of a row of sentence-transformers."""
    return f"sentence-transformers, {tokens} tokens" + (", without padding" if attention != PADDED else "")


def their_attention(device: torch.device) -> list[str]:
    """The attention implementations of sentence-transformers that can run here.

    The padded one always can. Padding is avoided where transformers finds the package flash-attn (2) or flash-attn-4.
    """
    from transformers.utils import import_utils

    found = {
        "flash_attention_4": import_utils.is_flash_attn_4_available,
        "flash_attention_2": import_utils.is_flash_attn_2_available,
    }
    ways = [name for name, available in found.items() if device.type == "cuda" and available()]
    if not ways:
        print("sentence-transformers without padding is left out: flash-attention is not installed", flush=True)
    return [PADDED, *ways[:1]]


def with_attention(network: Any, attention: str) -> Any:
    """The same SentenceTransformer with another attention implementation."""
    from sentence_transformers import SentenceTransformer

    if attention == PADDED:
        return network
    with tempfile.TemporaryDirectory() as folder:
        network.save(folder, create_model_card=False)
        kwargs = {"attn_implementation": attention}
        other = SentenceTransformer(folder, device=str(network.device), model_kwargs=kwargs)
    assert other[0].can_flatten_inputs, "flash-attention is used but inputs are still padded"
    return other


def their_tokens(features: dict[str, Any]) -> int:
    """Number of real tokens in a batch."""
    if "cu_seq_lens_q" in features:
        return int(features["cu_seq_lens_q"][-1])
    return int(features["attention_mask"].sum())


def flops(towers: Any) -> float:
    """FLOPs of one forward pass per token: four projections, two MLP layers, and attention over 100 tokens."""
    settings = towers.encoders[0].config
    width, inner = settings.hidden_size, settings.intermediate_size
    return settings.num_hidden_layers * (8 * width**2 + 4 * width * inner + 4 * 100 * width)


def report(row: dict[str, Any], ceiling: float, about: dict[str, Any]) -> dict[str, Any]:
    """Print a row and round it for the table."""
    used = 3 * row.pop("flops") * row["tokens_per_second"] / 1e12 / ceiling
    note = row.pop("note")
    row = {
        **row,
        "tokens_per_second": round(row["tokens_per_second"]),
        "pairs_per_second": round(row["pairs_per_second"], 1),
        "peak_mib": round(row["peak_mib"]),
        "planned_mib": round(row["planned_mib"]) if row.get("planned_mib") else "",
        "flop_utilisation": round(used, 3),
        "note": note,
        **about,
    }
    print(
        f"{row['method']:36} batch {row['batch']:7,}  {row['tokens_per_second']:10,} tokens/s  "
        f"{row['pairs_per_second']:9,.1f} pairs/s  {row['flop_utilisation']:.1%}  {row['peak_mib']:,} MiB"
        + (f" ({row['planned_mib']:,} planned)" if row["planned_mib"] else "")
        + f"  {note}",
        flush=True,
    )
    return row


def product_rate(device: torch.device) -> float:
    """TFLOP/s of a square matrix product, in bf16 on a GPU and in fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        one @ other
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


@contextlib.contextmanager
def silence_output() -> Iterator[None]:
    """Silence the trainer's own output."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        yield


if __name__ == "__main__":
    main()
