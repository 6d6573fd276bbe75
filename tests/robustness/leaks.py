"""Script: train, search and evaluate many times in one process, and show that memory, descriptors and threads are flat.

    python tests/robustness/leaks.py --steps 10000 --searches 1000 --evaluations 100 --csv figures.csv

A small model with random weights does the work, so that a leak per step is large beside what a step needs. The resident
memory is sampled 50 times. Its growth is the slope of a line through the samples after the first fifth, times the
number of calls. The exit code is 1 if it exceeds --mib, or if descriptors or threads become more.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "retriever"), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from cli_helpers import MEANINGS, write_beir, write_config, write_pairs  # noqa: E402
from tiny_model import tiny_model  # noqa: E402

import retriever  # noqa: E402
from index.progress import ProgressEvent  # noqa: E402

SAMPLES = 50
KINDS = ("steps", "searches", "evaluations")


@dataclass
class Samples:
    """Samples of what this process holds, in the course of `count` calls."""

    kind: str
    count: int
    rows: list[tuple[int, float, int, int]] = field(default_factory=list)
    """(calls done, MiB, descriptors, threads)."""
    started: float = field(default_factory=time.perf_counter)

    def add(self, done: int) -> None:
        """Take a sample if one is due."""
        if done * SAMPLES // self.count <= len(self.rows) - 1:
            return
        if not self.rows:
            # Modules need not be searched again for each sample.
            gc.freeze()
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        self.rows.append((done, resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))

    def figures(self) -> dict[str, int | float | str]:
        """What changed after the first fifth, while libraries load and caches fill."""
        late = np.array([row for row in self.rows if row[0] >= self.count / 5])
        growth = np.polyfit(late[:, 0], late[:, 1], 1)[0] * self.count
        return {
            "kind": self.kind,
            "calls": self.count,
            "seconds": round(time.perf_counter() - self.started),
            "mib_before": round(float(late[0, 1]), 1),
            "mib_after": round(float(late[-1, 1]), 1),
            "growth_mib": round(float(growth), 2),
            "more_descriptors": int(late[-1, 2] - late[0, 2]),
            "more_threads": int(late[-1, 3] - late[0, 3]),
        }


def train(folder: Path, samples: Samples) -> None:
    """A run with as many steps, with dev evaluations and checkpoints in between."""
    pairs, beir = write_pairs(folder / "pairs.jsonl"), write_beir(folder / "beir")
    often = max(1, samples.count // 10)
    config = write_config(
        folder / "run.yaml",
        tiny_model(folder / "tokenizer"),
        pairs,
        dev={"path": str(beir), "every": often, "at_start": False},
        **{"steps": samples.count, "epochs": 1e6, "batch_size": 4, "checkpoint_every": often, "plot": False},
    )

    samples.started = time.perf_counter()

    def sample(event: ProgressEvent) -> None:
        if event.unit == "steps":
            samples.add(event.done)

    retriever.train(config, progress=sample)


def repeated(samples: Samples, call: Callable[[int], Any]) -> None:
    """Call a function as many times."""
    for number in range(samples.count):
        call(number)
        samples.add(number + 1)


def main(words: list[str]) -> int:
    """Run all three; the exit code is 1 if anything grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--searches", type=int, default=100, help="searches of an index")
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations on a BEIR folder")
    parser.add_argument("--mib", type=float, default=8.0, help="largest growth of the resident memory, in MiB")
    parser.add_argument("--csv", type=Path, help="file of figures, one row per kind of call")
    arguments = parser.parse_args(words)
    steps, searches, evaluations = (Samples(kind, getattr(arguments, kind)) for kind in KINDS)
    with tempfile.TemporaryDirectory(prefix="leaks-") as temporary:
        folder = Path(temporary)
        train(folder, steps)
        model = retriever.load(folder / "run" / "model")
        store = retriever.encode(model, folder / "beir", folder / "store")
        index, texts = retriever.build_index(store, folder / "index"), list(MEANINGS.values())
        searches.started = time.perf_counter()
        repeated(searches, lambda n: retriever.search(model, index, [f"{texts[n % 20]} {n}"], k=5))
        evaluations.started = time.perf_counter()
        # Every second one writes a report.
        repeated(
            evaluations,
            lambda n: retriever.evaluate(model, folder / "beir", out=folder / f"report{n}" if n % 2 else None),
        )
    rows = [samples.figures() for samples in (steps, searches, evaluations)]
    for row in rows:
        print(row, flush=True)
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    flat = all(
        row["growth_mib"] <= arguments.mib and row["more_descriptors"] <= 0 and row["more_threads"] <= 0
        for row in rows
        if isinstance(row["growth_mib"], float)
    )
    print("flat" if flat else "not flat")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
