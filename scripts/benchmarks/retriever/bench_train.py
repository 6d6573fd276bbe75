"""Training steps: ours, data loading included, beside sentence-transformers' cached loss, its batches in memory.

    python scripts/benchmarks/retriever/bench_train.py --device cuda --tokenizer FOLDER --batch 16384 65536
    python scripts/benchmarks/retriever/bench_train.py --device cpu --model FOLDER --batch 512  MiniLM, say

Both train the same model with AdamW on the same batches of the same texts in the same order, after as many steps that
are not counted. Theirs is measured at each of --their-tokens, padded, and without padding where flash-attention is
installed; the best is the one compared. Where --budget is short, larger batches are measured at the best of the smaller
ones alone, and with fewer steps. Model FLOP utilisation is three forwards' worth of matrix products for each real token
(no credit for padding or for a second forward), over the rate of an 8192-cubed product measured in the same run. Beside
the measured peak of GPU memory stands the one that `retriever train --dry-run` predicts. Each row goes to
scripts/results/train.csv as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
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
from retriever.config.run import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from retriever.config.sources import SourceConfig
from retriever.models.towers import build_towers
from retriever.training.trainer import Trainer
from retriever.utils.device import Precision, autocast
from retriever.utils.progress import Terminal
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.datasets.sized_texts import SizedTexts

MIB = 2**20
LR = 1e-5
PADDED = "sdpa"
# Ours, and the setting that each way wants.
WAYS = {"ours": "", "ours, compiled": "compile", "ours, CUDA graphs": "cuda_graphs"}
# Of the time that is left, for the steps of one batch size; the rest goes into texts, loading and saving.
OUR_SHARE, THEIR_SHARE = 0.25, 0.7


def main() -> None:
    """Measure every batch size, ours and theirs, and keep the rows."""
    options = parse_arguments()
    budget = Budget(options.budget)
    device = torch.device(options.device)
    model = model_config(options)
    tokenizer = build_towers(model).tokenizer("query").tokenizer
    ceiling = product_rate(device)
    about = {**machine(), "commit": options.commit or machine()["commit"], "product_tflops": round(ceiling, 1)}
    print(f"{about['hardware']}: matrix product {ceiling:.1f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(report(row, ceiling, about))
        write(options.results / "train.csv", rows)
        return rows[-1]

    settings = [(attention, tokens) for attention in their_attention(device) for tokens in options.their_tokens]
    # Seconds a pair of the smaller batches, by which the larger ones are cut to the budget.
    our_pace = their_pace = 0.0
    for batch in sorted(options.batch):
        for way, setting in WAYS.items():
            if setting and not getattr(options, setting):
                continue
            steps = budget.repeats(OUR_SHARE, our_pace * batch, least=4, most=options.steps)
            row, texts = ours(model, tokenizer, batch, steps, way, options)
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
    print(f"{budget.spent():.0f} s in all", flush=True)


@dataclass(frozen=True)
class Budget:
    """Seconds for a whole benchmark, from its making on; without end if none."""

    seconds: float | None
    start: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left(self) -> float:
        """Seconds; 0 once all are spent."""
        return math.inf if self.seconds is None else max(0.0, self.seconds - self.spent())

    def repeats(self, share: float, seconds: float, *, least: int, most: int) -> int:
        """How many repeats of so many `seconds` go into a share of what is left; `most` where that is not known."""
        if not seconds or self.seconds is None:
            return most
        return min(most, max(least, int(share * self.left() / seconds)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--model", default="", help="folder of a model; BERT-base with random weights if not given")
    parser.add_argument("--tokenizer", help="folder of a BERT tokenizer, for BERT-base")
    parser.add_argument("--batch", type=int, nargs="+", default=[16384, 65536], help="pairs a step")
    parser.add_argument("--steps", type=int, default=8, help="ours; the first ones, `warm_up`, are not counted")
    parser.add_argument("--their-steps", type=int, default=4, help="theirs; as many are not counted")
    parser.add_argument("--their-tokens", type=int, nargs="*", default=[16384, 65536], help="their micro-batches")
    parser.add_argument("--workers", type=int, default=8, help="processes that tokenize")
    parser.add_argument("--budget", type=float, help="seconds for all of it, kept to by fewer steps (not given: none)")
    parser.add_argument("--compile", action="store_true", help="measure ours with torch.compile as well")
    parser.add_argument("--cuda-graphs", action="store_true", help="and with CUDA graphs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for train.csv")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The towers of both."""
    if options.model:
        return ModelConfig(name=options.model, max_length=252)
    return ModelConfig(architecture={"model_type": "bert"}, tokenizer=options.tokenizer, pooling="mean", max_length=252)


def warm_up(batch: int) -> int:
    """Steps that are not counted, of either."""
    return 2 if batch < 16384 else 1


def ours(
    model: ModelConfig, tokenizer: Any, batch: int, steps: int, way: str, options: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[list[str], list[str]]]]:
    """`retriever train`, its own measurements taken from metrics.jsonl, and the queries and positives of its steps."""
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
            compile=WAYS[way] == "compile",
            cuda_graphs=WAYS[way] == "cuda_graphs",
            log_every=warm_up(batch),
            checkpoint_every=10**6,
        )
        reset_peak()
        with quiet():
            trainer = Trainer.start(config, Terminal())
            plan = trainer.plan()
            texts = [(b.queries, b.positives) for b in map(trainer.batches.batch, range(steps))]
            trainer.train()
        lines = (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines][1:]
        kept = trainer.graphs
    middle = {key: statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "pairs_per_second")}
    note = f"micro-batches of {kept.micro_batch_tokens} tokens, {kept.graph_tokens} tokens' graphs kept"
    row = {
        "method": way,
        "batch": batch,
        **middle,
        "peak_mib": peak_mib(),
        # On a CPU the plan is of the whole process, whose peak torch does not count.
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
    """Its cached loss with micro-batches of `tokens` tokens on the queries and positives of some steps, which are
    tokenized before the clock starts."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    towers = build_towers(model).to(options.device)
    network = with_attention(towers.model, attention)
    # Autocast on a CPU makes theirs slower.
    precision: Precision = "bf16" if towers.device.type == "cuda" else "fp32"
    if precision == "bf16":
        # Around the forward, as its own trainer has it: the one that backward repeats is then in bf16 too.
        network.forward = torch.autocast(towers.device.type, torch.bfloat16)(network.forward)
    loss = CachedMultipleNegativesRankingLoss(network, mini_batch_size=2048, mini_batch_num_tokens=tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, fused=True)
    batch = len(texts[0][0])
    seconds, counted = [], []
    reset_peak()
    for number, columns in enumerate(texts):
        features = [network.preprocess(column) for column in columns]
        real = sum(their_tokens(each) for each in features)
        features = [{k: v.to(options.device) if hasattr(v, "to") else v for k, v in f.items()} for f in features]
        wait(towers.device)
        start = time.perf_counter()
        with autocast(towers.device, precision):
            value = loss(features, torch.empty(0))
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(towers.device)
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
    """How a row of theirs is called."""
    return f"sentence-transformers, {tokens} tokens" + (", without padding" if attention != PADDED else "")


def their_attention(device: torch.device) -> list[str]:
    """Kinds of attention of theirs that run here: padded, and without padding by a flash-attention of varying lengths.

    It drops padding where transformers finds the package flash-attn (2) or flash-attn-4.
    """
    from transformers.utils import import_utils

    found = {
        "flash_attention_4": import_utils.is_flash_attn_4_available,
        "flash_attention_2": import_utils.is_flash_attn_2_available,
    }
    ways = [name for name, available in found.items() if device.type == "cuda" and available()]
    if not ways:
        print("sentence-transformers without padding: cannot run here, flash-attention is not installed", flush=True)
    return [PADDED, *ways[:1]]


def with_attention(network: Any, attention: str) -> Any:
    """The same SentenceTransformer with another kind of attention."""
    from sentence_transformers import SentenceTransformer

    if attention == PADDED:
        return network
    with tempfile.TemporaryDirectory() as folder:
        network.save(folder, create_model_card=False)
        kwargs = {"attn_implementation": attention}
        other = SentenceTransformer(folder, device=str(network.device), model_kwargs=kwargs)
    assert other[0].can_flatten_inputs, "it pads all the same"
    return other


def their_tokens(features: dict[str, Any]) -> int:
    """Real tokens of a batch."""
    if "cu_seq_lens_q" in features:
        return int(features["cu_seq_lens_q"][-1])
    return int(features["attention_mask"].sum())


def flops(towers: Any) -> float:
    """Operations of one forward, a token: four projections and two layers of the MLP, and attention over 100 tokens."""
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
    """TFLOP/s of a square product, of bf16 on a GPU and of fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        one @ other
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak() -> None:
    """Forget the memory of what ran before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """Most memory that torch's allocator gave out since `reset_peak`; not known on a CPU."""
    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainer's own lines."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        yield


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the same hardware; keep those of others."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as stream:
            kept = [row for row in csv.DictReader(stream) if row["hardware"] != rows[0]["hardware"]]
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
