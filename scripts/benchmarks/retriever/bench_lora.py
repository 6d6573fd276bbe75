"""LoRA on a decoder of the shape of Qwen3-0.6B with random weights: `retriever train` against sentence-transformers.

    python scripts/benchmarks/retriever/bench_lora.py --tokenizer FOLDER --batch 1024

--tokenizer is the folder of any fast tokenizer, for example that of all-MiniLM-L6-v2; the decoder has a vocabulary of
--vocabulary tokens. Both train the same updates of the same model with AdamW on the same batches of the same texts,
with last-token pooling, the base in bf16, and a gradient cache. Ours include data loading; their texts are tokenized
before the clock starts. sentence-transformers uses peft and CachedMultipleNegativesRankingLoss at each of
--their-tokens; its best setting is the one compared. The loss of the first step, from the same weights, must agree.

The planned peak memory is the one that `retriever train --dry-run` prints. Rows are written to lora.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from retriever.cli.terminal import Terminal
from retriever.config.data import DataConfig
from retriever.config.lora import LoraConfig
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.models.loading.lora import cast_base
from retriever.models.modality import build_towers
from retriever.training.trainer import Trainer
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever.bench_train import silence_output
from scripts.benchmarks.timing import MIB, peak_mib, reset_peak_memory, synchronize
from scripts.datasets.sized_texts import SizedTexts

LR, SCALE = 1e-4, 20.0
WARM_UP = 2
# Qwen3-0.6B.
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
}
Step = tuple[list[str], list[str]]
Stored = Literal["auto", "nf4"]


def main() -> None:
    """Measure both libraries and write the rows."""
    options = parse_arguments()
    about = machine(options.commit)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append({**row, **about})
        update_rows(rows, options.results / "lora.csv", key=["hardware"])
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", options)
        for batch in options.batch:
            for graphs in (False, True) if options.cuda_graphs else (False,):
                row, texts = ours(base, batch, options, cuda_graphs=graphs)
                keep(row)
            best = max(row["pairs_per_second"] for row in rows if row["batch"] == batch)
            if options.nf4:
                keep(ours(base, batch, options, cuda_graphs=False, stored="nf4")[0])
            theirs = []
            for tokens in options.their_tokens:
                try:
                    row = sentence_transformers(base, texts, tokens, options)
                except torch.OutOfMemoryError:
                    print(f"sentence-transformers, {tokens} tokens, batch {batch}: out of memory", flush=True)
                    continue
                difference = abs(row["first_loss"] - rows[0]["first_loss"])
                if batch == options.batch[0] and difference > 0.02 * abs(rows[0]["first_loss"]):
                    raise SystemExit(f"the first losses differ: {rows[0]['first_loss']}, {row['first_loss']}")
                theirs.append(row["pairs_per_second"])
                keep(row)
            if theirs:
                print(f"batch {batch}: {best / max(theirs):.2f} times sentence-transformers with peft", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--tokenizer", required=True, help="folder of a fast tokenizer")
    parser.add_argument("--vocabulary", type=int, default=151_669, help="rows of the embedding (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=28, help="layers of the decoder (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the updates (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1024], help="batch sizes in pairs (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps, two of them for warm-up (default: %(default)s)")
    parser.add_argument("--their-tokens", type=int, nargs="*", default=[8192, 16384, 32768], help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="our tokenizer processes (default: %(default)s)")
    parser.add_argument("--nf4", action="store_true", help="also measure ours with a base of 4 bits (QLoRA)")
    parser.add_argument("--cuda-graphs", action="store_true", help="also measure ours with CUDA graphs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of lora.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def write_base(folder: Path, options: argparse.Namespace) -> str:
    """Write the decoder with random weights; both libraries load it."""
    torch.manual_seed(0)
    architecture = {**SHAPE, "num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    config = ModelConfig(architecture=architecture, tokenizer=options.tokenizer, pooling="lasttoken", max_length=252)
    folder.mkdir()
    build_towers(config).save(folder)
    return str(folder)


def model_config(base: str, rank: int, stored: Stored = "auto") -> ModelConfig:
    """The model that both libraries train."""
    return ModelConfig(name=base, max_length=252, lora=LoraConfig(rank=rank, base=stored))


def ours(
    base: str, batch: int, options: argparse.Namespace, *, cuda_graphs: bool, stored: Stored = "auto"
) -> tuple[dict[str, Any], list[Step]]:
    """Run `retriever train`. Returns a row, and the queries and positives of every step."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        SizedTexts(build_towers(ModelConfig(name=base)).tokenizer("query").tokenizer).write_pairs(pairs, batch * 4)
        config = TrainConfig(
            out=f"{folder}/run",
            model=model_config(base, options.rank, stored),
            data=DataConfig(sources=(SourceConfig(path=str(pairs)),), workers=options.workers),
            loss=LossConfig(logit_scale=SCALE),
            optim=OptimConfig(lr=LR, schedule="constant", warmup_fraction=0.0),
            batch_size=batch,
            steps=options.steps,
            device=options.device,
            cuda_graphs=cuda_graphs,
            log_every=1,
            checkpoint_every=10**6,
        )
        reset_peak_memory()
        with silence_output():
            trainer = Trainer.start(config, Terminal())
            plan = trainer.plan()
            reset_peak_memory()
            texts = [(b.queries, b.positives) for b in map(trainer.batches.batch, range(options.steps))]
            trainer.train()
        lines = (trainer.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
    row = {
        "method": "ours" + ", CUDA graphs" * cuda_graphs + ", base of 4 bits" * (stored == "nf4"),
        "batch": batch,
        "pairs_per_second": round(statistics.median(row["pairs_per_second"] for row in rows[WARM_UP:]), 1),
        "peak_mib": round(rows[-1]["memory_mib"]),
        "planned_mib": round(plan.peak / MIB),
        "first_loss": round(rows[0]["loss"], 4),
    }
    return row, texts


def sentence_transformers(base: str, texts: list[Step], tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train the same steps with sentence-transformers, peft and micro-batches of `tokens` tokens."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    torch.manual_seed(0)
    towers = build_towers(model_config(base, options.rank))
    on_gpu = options.device != "cpu"
    if on_gpu:
        # The base in bf16, as `model_kwargs={"dtype": torch.bfloat16}` loads it.
        cast_base(towers.encoders, torch.bfloat16)
    towers.to(options.device)
    network = towers.model
    if on_gpu:
        # As in its own trainer, autocast wraps the forward, so that the recomputed one runs in bf16, too.
        network.forward = torch.autocast("cuda", torch.bfloat16)(network.forward)
    loss = CachedMultipleNegativesRankingLoss(network, scale=SCALE, mini_batch_size=2048, mini_batch_num_tokens=tokens)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    batch, seconds, losses = len(texts[0][0]), [], []
    reset_peak_memory()
    for columns in texts:
        features = [network.preprocess(column) for column in columns]
        features = [{k: v.to(options.device) if hasattr(v, "to") else v for k, v in f.items()} for f in features]
        synchronize(towers.device)
        start = time.perf_counter()
        value = loss(features, torch.empty(0))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(towers.device)
        seconds.append(time.perf_counter() - start)
        losses.append(value.item())
    return {
        "method": f"sentence-transformers with peft, {tokens} tokens",
        "batch": batch,
        "pairs_per_second": round(batch / statistics.median(seconds[WARM_UP:]), 1),
        "peak_mib": round(peak_mib()),
        "planned_mib": "",
        "first_loss": round(losses[0], 4),
    }


if __name__ == "__main__":
    main()
