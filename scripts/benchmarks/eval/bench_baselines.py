"""BM25, dense models and a hybrid on the three bundled sets, with the commands that a user would type.

    python scripts/benchmarks/eval/bench_baselines.py --model MiniLM-L6=FOLDER trained=runs/quickstart/run/model

Rows are written to scripts/results/baselines.csv, the full report to report/report.html in the folder --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))


from scripts import DATA, RESULTS, ROOT
from scripts.benchmarks.commands import retriever, shell
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

MEASURES = ("ndcg@10", "recall@100", "mrr@10", "map@100")


def main() -> None:
    """Evaluate every model on every set, compare them, and write the rows."""
    options = parse_arguments()
    models = dict(word.split("=", 1) for word in options.model)
    first = next(iter(models))
    words = options.out / "wordnet-verb"
    shell(sys.executable, ROOT / "scripts" / "datasets" / "make_wordnet.py", "subset", "--pos", "verb", "--out", words)
    data = [DATA / "jargon", DATA / "perlfaq", words]
    for name, model in models.items():
        retriever("evaluate", "beir", "--model", model, "--data", *data, "--out", options.out / name)
    systems = [f"{name}={options.out / name}" for name in models]
    flags = ["--bm25", "--fuse", f"{first}+BM25", "--baseline", first, "--title", "Baselines on the bundled sets"]
    retriever("evaluate", "compare", *systems, *flags, "--data", *data, "--out", options.out / "report")
    report = json.loads((options.out / "report" / "report.json").read_text(encoding="utf-8"))
    write_csv(RESULTS / "baselines.csv", report)
    print(f"report: {options.out / 'report' / 'report.html'}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME=MODEL",
        help="models by name; the others are tested against the first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/baselines"),
        help="folder to write; a previous run there is continued (default: %(default)s)",
    )
    return parser.parse_args()


def write_csv(path: Path, report: dict[str, Any]) -> None:
    """Write a row for each set and system: its measures, and its comparison with the first model by nDCG@10."""
    compared = ("difference", "low", "high", "wins", "losses", "ties", "p_t", "p_randomisation", "p_corrected")
    rows, about = [], machine()
    for name, found in report["sets"].items():
        pairs = {pair["b"]: pair for pair in found["comparisons"]}
        for system, scored in found["systems"].items():
            values = {measure: f"{scored['mean'][measure]:.6f}" for measure in MEASURES}
            pair = pairs.get(system, {})
            tests = {column: f"{pair[column]:.6g}" if column in pair else "" for column in compared}
            rows.append({"set": name, "queries": found["queries"], "system": system, **values, **tests, **about})
    write_rows(rows, path)


if __name__ == "__main__":
    main()
