"""Matryoshka, distillation and training of the query tower alone, on the bundled WordNet from MiniLM.

    python scripts/benchmarks/retriever/bench_nested_training.py --device cuda --seeds 3
    python scripts/benchmarks/retriever/bench_nested_training.py --device cpu --passages 2000 --steps 6 --batch 64

Three comparisons, each at equal steps and batch size, scored on the held-out test definitions:

- matryoshka: a run with loss.matryoshka against a plain run, both truncated to several dimensions;
- distillation: a student with a teacher's embeddings (pool_kl and regression) against the plain run. The teacher is
  MiniLM, trained for twice the steps with random passages and the symmetric loss;
- query tower: from the plain model, query_only against all passages of the corpus, and further in-batch training.

Rows are written to nested_training.csv after each run; those that are there, of the same hardware and settings, are not
measured again. `--rows` selects some runs. The runs that they start from are trained again where they are needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from index.beir import BeirDataset, beir_file, read_queries
from index.passages import PassageFile
from scripts import DATA, RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.budget import Budget
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import identities, identity, update_rows
from scripts.benchmarks.retriever.bench_train import silence_output

WORDNET = DATA / "wordnet"
DIMS = (48, 96, 192, 384)
# Run -> its comparison. Only those of FIRST are measured for the first seed alone.
RUNS = {
    "MiniLM": "matryoshka",
    "plain": "matryoshka",
    "matryoshka": "matryoshka",
    "teacher": "distillation",
    "student with teacher": "distillation",
    "before": "query tower",
    "query_only": "query tower",
    "in batch, passages fixed": "query tower",
    "in batch, two towers": "query tower",
    "in batch, one tower": "query tower",
}
FIRST = ("MiniLM", "teacher")
KEY = ("run", "seed", "hardware", "passages", "steps", "batch", "lr")
MEASURES = ("ndcg@10", "recall@100")


def main() -> None:
    """Run the comparisons and write the rows."""
    options = parse_arguments()
    file = options.results / "nested_training.csv"
    facts = machine(options.commit)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        bench = Bench(options, Path(folder))
        common = {**bench.facts, "hardware": facts["hardware"]}
        wanted = [(run, seed) for seed in range(options.seeds) for run in options.rows if seed == 0 or run not in FIRST]
        measured = identities(file, KEY)
        planned = [
            each for each in wanted if identity({"run": each[0], "seed": each[1], **common}, KEY) not in measured
        ]
        print(f"{len(wanted) - len(planned)} of {len(wanted)} runs are in {file}", flush=True)
        budget = Budget(options.budget, len(planned), options.steps * options.batch, options.device)
        for run, seed in planned:
            if not budget.allows(f"{run}, seed {seed}"):
                return
            with silence_output():
                scores = list(bench.rows(run, seed))
            update_rows(
                [{"comparison": RUNS[run], "run": run, "seed": seed, **row, **bench.facts, **facts} for row in scores],
                file,
                key=(*KEY, "dim"),
            )
            shown = ", ".join(f"{row['ndcg@10']} of {row['dim']} dimensions" for row in scores)
            budget.count(f"{run}, seed {seed}: nDCG@10 {shown}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=0, help="first passages of the corpus; 0: all (default)")
    runs = list(RUNS)
    parser.add_argument("--rows", nargs="+", choices=runs, default=runs, help="runs to measure (default: all)")
    parser.add_argument("--budget", type=float, default=450, help="seconds in which the runs must end (default: 450)")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for temporary runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of nested_training.csv")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


class Bench:
    """Data and settings that the runs share; trains, embeds and scores."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.data = WORDNET if not options.passages else first_passages(options.passages, folder / "data")
        self.precision: Any = "bf16" if options.device.startswith("cuda") else "fp32"
        passages = sum(1 for _ in PassageFile(beir_file(self.data, "corpus.jsonl")))
        self.facts = {"passages": passages, "steps": options.steps, "batch": options.batch, "lr": options.lr}
        self._trained: dict[tuple[str, int], tuple[Path, float]] = {}

    def rows(self, run: str, seed: int) -> Iterator[dict[str, Any]]:
        """Train a model and yield its measures on the test queries, of each dimension for matryoshka."""
        model, seconds = self.trained(run, seed)
        loaded = retriever.load(model, device=self.options.device, precision=self.precision)
        dims = DIMS if RUNS[run] == "matryoshka" else ()
        found = retriever.evaluate(loaded, self.data, k=100, dims=dims)
        of_dims = found.by_dim if dims else {loaded.dimension: found.sets}
        for dim, sets in sorted(of_dims.items()):
            (metrics,) = (each.metrics for each in sets.values())
            yield {"dim": dim, **{name: f"{metrics[name]:.4f}" for name in MEASURES}, "seconds": f"{seconds:.1f}"}

    def trained(self, run: str, seed: int) -> tuple[Path, float]:
        """The model folder of a run and the seconds of its training, start included; trained on first use."""
        if run == "MiniLM":
            return Path(self.options.model), 0.0
        if run == "before":
            return self.trained("plain", seed)
        if (run, seed) not in self._trained:
            self._trained[run, seed] = self._train(f"{run} {seed}", seed, **self._settings(run, seed))
        return self._trained[run, seed]

    def _settings(self, run: str, seed: int) -> dict[str, Any]:
        """The settings of a run that differ from those of "plain"."""
        if run == "plain":
            return {}
        if run == "matryoshka":
            return {"loss": {"matryoshka": {"dims": list(DIMS)}}}
        if run == "teacher":
            random = min(8 * self.options.batch, self.facts["passages"])
            corpus = {"random_passages": random, "corpus": str(self.data)}
            return {"data": corpus, "loss": {"symmetric": True}, "steps": 2 * self.options.steps}
        if run == "student with teacher":
            teacher = str(self.trained("teacher", 0)[0])
            kind = {"kind": "pool_kl", "model": teacher, "scale": 20.0, "weight": 1.0, "regression": 1.0}
            return {"loss": {"teacher": kind}}
        # All others continue from the plain model.
        towers: dict[str, dict[str, Any]] = {
            "query_only": {"shared": False},
            "in batch, passages fixed": {"shared": False, "freeze": "passage"},
            "in batch, two towers": {"shared": False},
            "in batch, one tower": {},
        }
        model = self.trained("plain", seed)[0]
        settings: dict[str, Any] = {"model": {"name": str(model), **towers[run]}}
        return {**settings, "query_only": str(self._store(model))} if run == "query_only" else settings

    def _store(self, model: Path) -> Path:
        """Embeddings of all passages by a model, as a new store."""
        store = Path(tempfile.mkdtemp(dir=self.folder)) / "embeddings"
        loaded = retriever.load(model, device=self.options.device, precision=self.precision)
        retriever.encode(loaded, self.data, store)
        return store

    def _train(self, name: str, seed: int, **settings: Any) -> tuple[Path, float]:
        started = time.perf_counter()
        data = {"sources": [{"path": str(self.data)}], "cache": str(self.folder / "cache"), **settings.pop("data", {})}
        run = retriever.train(
            {
                "out": str(self.folder / name),
                "model": {"name": str(self.options.model)},
                "data": data,
                "optim": {"lr": self.options.lr},
                "batch_size": self.options.batch,
                "steps": self.options.steps,
                "device": self.options.device,
                "precision": self.precision,
                "checkpoint_every": 10**6,
                "seed": seed,
                **settings,
            },
        )
        return run.model_folder, time.perf_counter() - started


def first_passages(count: int, folder: Path) -> Path:
    """Write a BEIR folder of the first passages of WordNet and the queries that only they answer."""
    (folder / "qrels").mkdir(parents=True)
    kept: set[str] = set()
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for passage, _ in zip(PassageFile(beir_file(WORDNET, "corpus.jsonl")), range(count), strict=False):
            kept.add(passage.id)
            stream.write(line({"_id": passage.id, "title": passage.title, "text": passage.text}))
    queries = read_queries(beir_file(WORDNET, "queries.jsonl"))
    used: set[str] = set()
    for split in ("train", "dev", "test"):
        judged = BeirDataset.open(WORDNET, split).qrels
        inside = {query: grades for query, grades in judged.items() if grades.keys() <= kept}
        used |= inside.keys()
        rows = (f"{query}\t{passage}\t{grade}" for query, grades in inside.items() for passage, grade in grades.items())
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows])
        (folder / "qrels" / f"{split}.tsv").write_text(text + "\n", encoding="utf-8")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(line({"_id": query, "text": queries[query]}) for query in used)
    return folder


def line(row: dict[str, str]) -> str:
    """A line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
