"""What each option of the loss does for MiniLM: nDCG@10 on the bundled sets, and pairs per second.

    python scripts/benchmarks/retriever/bench_switches.py --device cuda --seeds 3
    python scripts/benchmarks/retriever/bench_switches.py --device cpu --queries 600 --batch 32 --rows "no option"

Every run starts from the same weights and makes one pass over the training queries of WordNet; only the options of the
loss and the passages of a row differ. Hard negatives are mined first with the untrained model, and the same file is
read by all runs. The guide is the untrained model. The test queries of WordNet are evaluated and, without --queries,
two sets of other domains, Jargon File and perlfaq. Rows are written to switches.csv after each run, one for each option
and seed; those that are there, of the same hardware and batch size, are not measured again.
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
from index.beir import BeirDataset
from scripts import DATA, RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.budget import Budget
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import identities, identity, update_rows
from scripts.benchmarks.retriever.bench_train import silence_output

WORDNET = DATA / "wordnet"
OTHERS = ("jargon", "perlfaq")
HARD = 4
KEY = ("switch", "seed", "batch", "queries", "hardware")
GUIDE = "the untrained model"
UNTRAINED = "before training"
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
    facts = machine(options.commit)
    file = options.results / "switches.csv"
    data = WORDNET
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if options.queries is not None:
            data = subset(WORDNET, work / "wordnet", options.queries)
        queries = len(BeirDataset.open(data, "train").qrels)
        common = {"batch": options.batch, "queries": queries, "hardware": facts["hardware"]}
        wanted = [(UNTRAINED, 0)] * (UNTRAINED in options.rows)
        wanted += [(name, seed) for seed in range(options.seeds) for name in options.rows if name != UNTRAINED]
        measured = identities(file, KEY)
        planned = [run for run in wanted if identity({"switch": run[0], "seed": run[1], **common}, KEY) not in measured]
        print(f"{len(wanted) - len(planned)} of {len(wanted)} runs are in {file}", flush=True)
        budget = Budget(options.budget, len(planned), queries, options.device)
        pairs = work / "pairs.jsonl"
        for name, seed in planned:
            if not budget.allows(f"{name}, seed {seed}"):
                return
            if name != UNTRAINED and not pairs.exists():
                with silence_output():
                    retriever.mine(options.model, data, pairs, negatives=HARD, device=options.device)
            started = time.perf_counter()
            row = trained(name, seed, options, work, pairs) if name != UNTRAINED else {"model": options.model}
            scores = evaluated(row.pop("model"), data, options.device)
            seconds = {"seconds": "" if options.no_rates else f"{time.perf_counter() - started:.1f}"}
            row = {"switch": name, "seed": seed, **common, **scores, **row, **seconds, **facts}
            update_rows([row], file, key=KEY)
            budget.count(f"{name}, seed {seed}: nDCG@10 {row['ndcg@10']}, {row.get('pairs_per_second', '–')} pairs/s")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each option (default: %(default)s)")
    parser.add_argument(
        "--queries", type=int, help="use only this many training queries and ten times as many passages"
    )
    rows = [UNTRAINED, *SWITCHES]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="options to measure (default: all)")
    parser.add_argument(
        "--no-rates",
        action="store_true",
        help="leave out the pairs per second, because other programs use the machine at the same time",
    )
    parser.add_argument("--budget", type=float, default=450, help="seconds in which the runs must end (default: 450)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for switches.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def trained(name: str, seed: int, options: argparse.Namespace, work: Path, pairs: Path) -> dict[str, Any]:
    """Train with one option. Returns the folder of the model, as "model", and columns of its row."""
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
    steps = [row for row in run.metrics if "pairs_per_second" in row]
    # The first interval includes the start.
    rates = sorted(row["pairs_per_second"] for row in steps[1:] or steps)
    last = steps[-1]
    return {
        "model": run.model_folder,
        "steps": run.step,
        "pairs_per_second": "" if options.no_rates else f"{rates[len(rates) // 2]:.0f}",
        "pool_accuracy@1": f"{last['pool_accuracy@1']:.4f}" if "pool_accuracy@1" in last else "",
        "pool_masked": f"{last['pool_masked']:.6f}" if "pool_masked" in last else "",
    }


def evaluated(model: str | Path, data: Path, device: str) -> dict[str, str]:
    """Columns of the scores of a model on the bundled sets."""
    precision: Any = "bf16" if device.startswith("cuda") else "fp32"
    with silence_output():
        loaded = retriever.load(model, device=device, precision=precision)
        others = OTHERS if data == WORDNET else ()
        report = retriever.evaluate(loaded, [data, *(DATA / name for name in others)], k=100)
    return {
        "ndcg@10": f"{report.sets['wordnet'].metrics['ndcg@10']:.4f}",
        "recall@100": f"{report.sets['wordnet'].metrics['recall@100']:.4f}",
        **{f"{name}_ndcg@10": f"{report.sets[name].metrics['ndcg@10']:.4f}" for name in others},
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
