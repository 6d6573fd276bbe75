"""BM25, models and a hybrid on the three bundled sets, by the commands a user would type.

    python scripts/benchmarks/eval/bench_baselines.py --model MiniLM-L6=FOLDER trained=runs/quickstart/run/model

Rows go to scripts/results/baselines.csv, the report to scripts/results/baselines.html.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))


from scripts import DATA, RESULTS, ROOT
from scripts.benchmarks.machine import machine

MEASURES = ("ndcg@10", "recall@100", "mrr@10", "map@100")


def main() -> None:
    """Evaluate every model on every set, compare them, keep the numbers and the report."""
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
    shutil.copyfile(options.out / "report" / "report.html", RESULTS / "baselines.html")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME=MODEL",
        help="models; the others are tested against the first",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), help="to fill; continued if there")
    return parser.parse_args()


def retriever(*words: object) -> None:
    """Run a command of this environment, which need not be on the PATH."""
    shell(sys.executable, "-m", "retriever", *words)


def shell(*words: object) -> None:
    """Print a command and run it."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}".replace(f"{sys.executable} -m retriever", "retriever"), flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_csv(path: Path, report: dict[str, Any]) -> None:
    """A row for each set and system: its measures, and how it compares with the first model by nDCG@10."""
    compared = ("difference", "low", "high", "wins", "losses", "ties", "p_t", "p_randomisation", "p_corrected")
    measured = machine()
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["set", "queries", "system", *MEASURES, *compared, *measured])
        for name, found in report["sets"].items():
            pairs = {pair["b"]: pair for pair in found["comparisons"]}
            for system, scored in found["systems"].items():
                values = [f"{scored['mean'][measure]:.6f}" for measure in MEASURES]
                pair = pairs.get(system, {})
                tests = [f"{pair[key]:.6g}" if key in pair else "" for key in compared]
                writer.writerow([name, found["queries"], system, *values, *tests, *measured.values()])


if __name__ == "__main__":
    main()
