"""Script: mutate the inputs of every reader, and count how the readers answer.

    python tests/robustness/fuzz.py --count 20000 --seed 1 --csv figures.csv

Each case is read in a forked child with 20 seconds of processor time and 3 GiB. It must be read, or refused in one
line. A case is a function of the seed, the reader and its number: `--reader NAME --case N` repeats it in this process.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

# Names that are no folder would be asked of the Hugging Face Hub, which takes 23 s without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "retriever"), str(HERE.parents[1])]

from artifacts import build  # noqa: E402
from cases import ALL_READERS, run_case  # noqa: E402
from children import Outcome, in_child, run_cases  # noqa: E402
from forks import LIBRARIES  # noqa: E402
from further import build_further  # noqa: E402
from tiny_model import tiny_model  # noqa: E402

# Cases that one child runs.
BATCH = 25


def main(words: list[str]) -> int:
    """Run the cases; the exit code is 1 if any of them is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of cases over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="only this reader; may be repeated")
    parser.add_argument("--case", type=int, help="run one case in this process and print how it ends")
    parser.add_argument("--csv", type=Path, help="file of figures, one row per reader")
    parser.add_argument("--work", type=Path, help="folder of the artifacts, which are kept. Default: a temporary one")
    arguments = parser.parse_args(words)
    import importlib

    for module in (*LIBRARIES, "datasets", "PIL.Image", "pyarrow.parquet"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="robustness-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        world = work / "artifacts"
        if not world.exists():
            in_child(lambda: build(world, tiny_model(work / "tokenizer")))
        names = arguments.reader or [*ALL_READERS, "command line"]
        wanted = {word for name in names if name in ALL_READERS for word in ALL_READERS[name].needs}
        in_child(lambda: build_further(world, wanted))
        if arguments.case is not None:
            print(run_case(names[0], world, work / "scratch", arguments.seed, arguments.case))
            return 0
        weights = {name: ALL_READERS[name].weight if name in ALL_READERS else 2.0 for name in names}
        share = arguments.count / sum(weights.values())
        rows = [
            _run_reader(name, max(1, round(weights[name] * share)), arguments.seed, world, work / "scratch")
            for name in names
        ]
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    cases, faults = sum(row["cases"] for row in rows), sum(row["faults"] for row in rows)
    print(f"{cases:,} cases, {faults:,} faults, seed {arguments.seed}")
    return 1 if faults else 0


def _run_reader(name: str, count: int, seed: int, world: Path, scratch: Path) -> dict[str, int | float | str]:
    start, kinds, shown = time.perf_counter(), Counter[str](), defaultdict[str, int](int)
    slowest, largest = 0.0, 0
    for first in range(0, count, BATCH):
        cases = range(first, min(first + BATCH, count))
        outcomes = run_cases(cases, partial(run_case, name, world, scratch, seed))
        for case, outcome in zip(cases, outcomes, strict=True):
            kinds[outcome.kind] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.mib)
            if outcome.is_fault:
                _show(name, case, outcome, shown)
    faults = sum(number for kind, number in kinds.items() if Outcome(kind, "").is_fault)
    print(f"{name}: {count} cases in {time.perf_counter() - start:.0f} s: {dict(kinds)}", flush=True)
    return {
        "reader": name,
        "cases": count,
        "read": kinds["ok"],
        "refused": kinds["refused"],
        "faults": faults,
        "slowest_s": round(slowest, 2),
        "peak_mib": largest,
    }


def _show(name: str, case: int, outcome: Outcome, shown: dict[str, int]) -> None:
    """Print a fault, the first ones of each kind at length."""
    key = outcome.kind + outcome.detail.strip().rpartition("\n")[2][:60]
    shown[key] += 1
    detail = outcome.detail if shown[key] <= 2 else outcome.detail[-100:]
    print(f"FAULT {outcome.kind}: --reader {name!r} --case {case}: {outcome.seconds:.1f} s\n{detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
