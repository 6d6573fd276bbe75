"""Training as a user runs it: the whole process, from the command to the saved model, beside sentence-transformers.

    python scripts/benchmarks/retriever/bench_whole.py --model FOLDER --batch 1024 8192

Both fine-tune the same model for one epoch on the same pairs (the bundled WordNet definitions and headwords) with the
same loss, InfoNCE with in-batch negatives. Ours is `retriever train` with no setting but the batch size; of
sentence-transformers the trainer in bf16, with and without worker processes, of which the faster is compared. Each is
started once before it is measured, so that files are in memory and kernels compiled. The compiled byte code of all
modules is cached for both. Rows go to whole_train.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import RESULTS, ROOT

LR = 2e-4
OURS = "ours, no settings"
THEIRS = {"sentence-transformers": 0, "sentence-transformers, 8 workers": 8}


def main() -> None:
    """Measure each method at each batch size."""
    options = parse_arguments()
    if options.their_batch:
        train_theirs(options.model, options.pairs, options.their_batch, options.their_workers, options.out)
        return
    # Imported here, because the child process should import what a user's script does and no more.
    from scripts.benchmarks.machine import machine
    from scripts.benchmarks.result_rows import update_rows

    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
            "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode"),
            "HF_HUB_OFFLINE": "1",
        }
        pairs = Path(folder) / "pairs.jsonl"
        write_pairs(pairs, options.rows)
        rows: list[dict[str, Any]] = []
        for batch in options.batch:
            for method in [OURS] if options.ours else [OURS, *THEIRS]:
                seconds, found = [], dict[str, Any]()
                for number in range(options.runs + 1):
                    out = Path(folder) / f"run-{len(rows)}-{number}"
                    command = command_of(method, options.model, pairs, batch, out)
                    started = time.perf_counter()
                    subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
                    if number:
                        seconds.append(time.perf_counter() - started)
                    if method == OURS:
                        found = rates(out / "metrics.jsonl")
                row = {
                    "part": "train",
                    "method": method,
                    "batch": batch,
                    "seconds": f"{statistics.median(seconds):.2f}",
                    "runs": len(seconds),
                    **found,
                    **machine(options.commit),
                }
                rows.append(row)
                print(f"{method:<36}{batch:>6}  {row['seconds']:>7} s  {found}", flush=True)
                update_rows(rows, options.results / "whole_train.csv", ("part", "method", "batch", "hardware"))


def command_of(method: str, model: str, pairs: Path, batch: int, out: Path) -> Sequence[str]:
    """The command line of one run."""
    if method == OURS:
        recipe = pairs.with_suffix(".yaml")
        recipe.write_text(
            json.dumps({"model": {"name": model}, "data": {"sources": [{"path": str(pairs)}]}, "optim": {"lr": LR}})
        )
        return [sys.executable, "-m", "retriever", "train", str(recipe), "--batch-size", str(batch), "--out", str(out)]
    settings = ["--their-batch", str(batch), "--their-workers", str(THEIRS[method]), "--out", str(out)]
    return [sys.executable, __file__, "--model", model, "--pairs", str(pairs), *settings]


def write_pairs(path: Path, rows: int | None) -> None:
    """Write the bundled training pairs as JSON lines."""
    from retriever.config.sources import SourceConfig
    from retriever.data.sources import Notices, read_examples

    source = SourceConfig(str(ROOT / "scripts" / "datasets" / "data" / "wordnet"))
    with path.open("w", encoding="utf-8") as stream:
        for number, example in enumerate(read_examples(source, Notices())):
            if number == rows:
                break
            stream.write(json.dumps({"query": example.query, "positive": example.positives[0]}) + "\n")


def rates(metrics: Path) -> dict[str, Any]:
    """Our rate in pairs/s in the second half of the steps."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = [line["pairs_per_second"] for line in lines if "pairs_per_second" in line]
    return {"steady_pairs_per_second": round(statistics.median(found[len(found) // 2 :]))}


def train_theirs(model: str, pairs: Path, batch: int, workers: int, out: Path) -> None:
    """Train with sentence-transformers as its documentation shows."""
    from datasets import load_dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    student = SentenceTransformer(model)
    arguments = SentenceTransformerTrainingArguments(
        str(out),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LR,
        warmup_ratio=0.1,
        bf16=student.device.type == "cuda",
        dataloader_num_workers=workers,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(
        model=student,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(pairs), cache_dir=str(out / "cache"))["train"],
        loss=losses.MultipleNegativesRankingLoss(student),
    ).train()
    student.save_pretrained(str(out / "model"))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 8192], help="batch sizes (default: 1024 8192)")
    parser.add_argument("--rows", type=int, help="pairs (default: all 93,285)")
    parser.add_argument("--runs", type=int, default=2, help="measured runs of each (default: %(default)s)")
    parser.add_argument("--ours", action="store_true", help="measure ours alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV (default: %(default)s)")
    parser.add_argument("--commit", help="commit of the code, for a copy without git")
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--their-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--their-workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
