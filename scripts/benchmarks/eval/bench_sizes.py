"""Bytes of an embedding against retrieval quality on the whole of WordNet: fewer dimensions, int8 and binary.

    python scripts/benchmarks/eval/bench_sizes.py --device cuda

Trains MiniLM with loss.matryoshka on the bundled definitions (--steps 0: does not), embeds all headwords once, and
scores the test definitions with every combination of dimensions and precision. Rows are written to sizes.csv. The table
of docs/guides/smaller_embeddings.md is made from them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from scripts import DATA, RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows

WORDNET = DATA / "wordnet"
DIMS = (48, 96, 192, 384)
PRECISIONS = ("int8", "binary", "binary+int8")
MEASURES = ("ndcg@10", "recall@100")


def main() -> None:
    """Train, evaluate and write the rows."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        model = trained(options, Path(folder)) if options.steps else Path(options.model)
        loaded = retriever.load(model, device=options.device)
        found = retriever.evaluate(loaded, WORDNET, k=100, dims=DIMS, precisions=PRECISIONS, out=options.out)
    facts = {"steps": options.steps, "batch": options.batch, "lr": options.lr}
    rows = []
    for dim, precision, size, sets in sorted(found.by_size, key=lambda each: -each[2]):
        (metrics,) = (each.metrics for each in sets.values())
        measures = {name: f"{metrics[name]:.4f}" for name in MEASURES}
        rows.append({"dim": dim, "precision": precision, "bytes": size, **measures, **facts, **machine(options.commit)})
        print(f"{dim:4} {precision:12} {size:5} bytes  nDCG@10 {measures['ndcg@10']}", flush=True)
    update_rows(rows, options.results / "sizes.csv", key=["hardware", "steps"])


def trained(options: argparse.Namespace, folder: Path) -> Path:
    """The model folder of a run with loss.matryoshka."""
    run = retriever.train(
        {
            "out": str(folder / "run"),
            "model": {"name": options.model, "dropout": 0.0},
            "data": {"sources": [{"path": str(WORDNET)}], "cache": str(folder / "cache")},
            "loss": {"symmetric": True, "matryoshka": {"dims": list(DIMS)}},
            "optim": {"lr": options.lr, "warmup_fraction": 0.1},
            "batch_size": options.batch,
            "steps": options.steps,
            "device": options.device,
            "checkpoint_every": 10**6,
        }
    )
    return run.model_folder


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=270, help="optimizer steps; 0: none (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder that keeps report and embeddings")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the temporary run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of sizes.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


if __name__ == "__main__":
    main()
