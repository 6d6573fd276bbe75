"""Each ingredient of scripts/recipes/best_text.yaml, added to a plain run and left out of the recipe.

    python scripts/benchmarks/retriever/bench_recipe.py --model FOLDER --list
    python scripts/benchmarks/retriever/bench_recipe.py --model FOLDER --rows base plain best --seeds 0 1 2 --test
    python scripts/benchmarks/retriever/bench_recipe.py --model FOLDER --rows "plain + ema" "best - ema" --minutes 8

Every row trains on the bundled WordNet, whole. The run keeps its best model on the dev split. It is then merged with
the base model: of the shares of the trained model 1, 0.9, …, 0.5, the smallest whose dev nDCG@10 is at most --tolerance
below the best. The two bundled sets of another domain, Jargon File and perlfaq, are evaluated before and after merging;
the test split of WordNet only with --test, so that rows can be compared on dev alone.

The rows "plain" and "best" differ in all ingredients; "plain + X" has one of them, and "best - X" has all others.
--set changes a field of the recipe: --set optim.lr=1e-4. Mined negatives are mined once, with the base model, and the
seconds count in each row that uses them. Rows are appended to recipes.csv as they are measured. A row that is there
with the same seed and settings is not repeated, and none is started after --minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from index.beir import BeirDataset
from index.progress import SilentReporter
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import load_config, with_overrides
from retriever.evaluation.beir import evaluate_towers
from retriever.utils.device import Precision
from scripts import RESULTS, ROOT
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import read_rows, write_rows
from scripts.benchmarks.timing import peak_mib, reset_peak_memory

RECIPE = ROOT / "scripts" / "recipes" / "best_text.yaml"
DATA = ROOT / "scripts" / "datasets" / "data"
OTHERS = ("jargon", "perlfaq")
METRIC = "ndcg@10"
# Stand for the file of mined negatives and for the base model in the fields of a row.
MINED, BASE = "MINED", "BASE"
# Share of the positive's score above which a mined negative is dropped.
MAX_SHARE: float | None = 0.95

# Ingredient -> fields of a run with it, and without it. A field that is absent with it is that of the recipe.
INGREDIENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "large batch": ({}, {"batch_size": 1024, "optim": {"lr": 1.4e-4}, "dev": {"every": 160}}),
    "epochs": ({}, {"epochs": 1}),
    "no dropout": ({}, {"model": {"dropout": None}}),
    "symmetric": ({}, {"loss": {"symmetric": False}}),
    "learned scale": ({}, {"loss": {"learn_logit_scale": False}, "optim": {"logit_scale_lr": None}}),
    "wsd": ({}, {"optim": {"schedule": "linear"}}),
    "ema": ({}, {"optim": {"ema": None}}),
}
# Ingredients that the recipe does not have: "best + X" and "plain + X".
CANDIDATES: dict[str, dict[str, Any]] = {
    "layer decay": {"optim": {"layer_decay": 0.9}},
    "all positives": {"data": {"positives": "all"}},
    "mined negatives": {"data": {"sources": [{"path": MINED}], "negatives": 4}},
    "own negatives": {"data": {"sources": [{"path": MINED}], "negatives": 4, "negatives_seen_by": "own"}},
    "limit 0.95": {"loss": {"limit": {"share": 0.95}}},
    "same side": {"loss": {"same_side": True, "symmetric": False}},
    "hardness": {"loss": {"hardness": 1.0}},
    "scale 50": {"loss": {"logit_scale": 50.0}},
    "adafactor": {"optim": {"name": "adafactor"}},
    "random passages": {"data": {"random_passages": 32768, "corpus": str(DATA / "wordnet")}},
    "guide": {"loss": {"guide": {"model": BASE}}},
    "regression to the base": {"loss": {"teacher": {"model": BASE, "regression": 1.0}}},
    "frozen layers": {"model": {"freeze_layers": 3}},
    "lora": {"model": {"lora": {"rank": 64}}, "optim": {"lr": 2.0e-3}},
}


def main() -> None:
    """Measure the requested rows."""
    options = parse_arguments()
    if options.list:
        print("\n".join(row_names()))
        return
    started = time.perf_counter()
    path = options.results / "recipes.csv"
    about = machine(options.commit)
    base = with_overrides(load_config(RECIPE), {"model": {"name": options.model}})
    for assignment in options.set:
        base = with_overrides(base, parse_assignment(assignment))
    longest = 0.0
    for seed in options.seeds if any(name != "base" for name in options.rows) else options.seeds[:1]:
        for name in options.rows:
            if name == "base" and seed != options.seeds[0]:
                continue
            begun = time.perf_counter()
            if begun - started + longest > 60 * options.minutes:
                print(f"no time left for {name!r}, seed {seed}", flush=True)
                return
            config = config_of(name, base, seed)
            key = {"recipe": name, "seed": str(seed), "settings": digest(config), "test": str(options.test)}
            rows = read_rows(path) if path.exists() else []
            if any(all(row.get(field) == value for field, value in key.items()) for row in rows):
                print(f"{name}, seed {seed}: measured already", flush=True)
                continue
            row = {**key, **measure(name, config, options), **about}
            write_rows([*rows, row], path)
            longest = max(longest, time.perf_counter() - begun)
            print("  ".join(f"{field} {value}" for field, value in row.items() if value != ""), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="folder of the base model, such as all-MiniLM-L6-v2")
    parser.add_argument("--rows", nargs="+", default=["base", "plain", "best"], help="names (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE, changes the recipe")
    parser.add_argument("--minutes", type=float, default=8.5, help="start no row that would end later (%(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=0.003, help="dev nDCG@10 that merging may cost (%(default)s)"
    )
    parser.add_argument("--test", action="store_true", help="also evaluate on the test split of WordNet")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the bundled sets (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "recipes", help="scratch folder (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of recipes.csv (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def row_names() -> list[str]:
    """Names of all rows."""
    plain = [f"plain + {name}" for name in (*INGREDIENTS, *CANDIDATES)]
    return [
        "base",
        "plain",
        *plain,
        "best",
        *(f"best - {n}" for n in INGREDIENTS),
        *(f"best + {n}" for n in CANDIDATES),
    ]


def parse_assignment(text: str) -> dict[str, Any]:
    """FIELD=VALUE as a mapping: {"optim": {"lr": 1e-4}}."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--set: expected FIELD=VALUE, found {text!r}")
    tree: Any = yaml.safe_load(value)
    for part in reversed(name.split(".")):
        tree = {part: tree}
    return dict(tree)


def config_of(name: str, recipe: TrainConfig, seed: int) -> TrainConfig:
    """The configuration of a row. The path of mined negatives is MINED."""
    if name not in row_names():
        raise SystemExit(f"--rows: expected one of {', '.join(row_names())}, found {name!r}")
    config = with_overrides(recipe, {"seed": seed})
    start, sign, ingredient = name.partition(" + ") if " + " in name else name.partition(" - ")
    if start == "plain":
        left_out: Iterable[str] = [each for each in INGREDIENTS if each != ingredient]
    else:
        left_out = [ingredient] if sign == " - " else []
    for each in left_out:
        config = with_overrides(config, INGREDIENTS[each][1])
    changes = INGREDIENTS[ingredient][0] if ingredient in INGREDIENTS else CANDIDATES.get(ingredient, {})
    return with_overrides(config, changes)


def with_base(config: TrainConfig) -> TrainConfig:
    """The configuration with the base model where BASE stands."""
    changes = {
        option: {"model": config.model.name}
        for option in ("guide", "teacher")
        if getattr(config.loss, option).model == BASE
    }
    return with_overrides(config, {"loss": changes}) if changes else config


def digest(config: TrainConfig) -> str:
    """Hash of the settings of a row."""
    tree = dataclasses.asdict(config)
    tree["model"].pop("name")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def measure(name: str, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Train, merge and evaluate one row."""
    wordnet = options.data / "wordnet"
    if name == "base":
        scores = {f"{other}_before": score(config.model.name, options.data / other, "test") for other in OTHERS}
        row: dict[str, Any] = {"dev": score(config.model.name, wordnet, "dev"), **scores}
        return row | ({"test_before": score(config.model.name, wordnet, "test")} if options.test else {})
    mining = 0.0
    source: dict[str, Any] = {"path": str(wordnet)}
    if config.data.sources[0].path == MINED:
        source, mining = mined_source(config, wordnet, options.work)
    run_folder = options.work / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    config = with_overrides(
        with_base(config),
        {
            "out": str(run_folder),
            "data": {
                "sources": [source],
                "cache": str(options.work / "cache"),
                **({"corpus": str(wordnet)} if config.data.random_passages else {}),
            },
            "dev": {"path": str(wordnet)},
        },
    )
    reset_peak_memory()
    begun = time.perf_counter()
    run = retriever.train(config)
    seconds = time.perf_counter() - begun
    peak = peak_mib()
    share, dev, merged_dev, merged = merge_with_base(run.model_folder, config, wordnet, options)
    row = {
        "batch": config.batch_size,
        "lr": config.optim.lr,
        "steps": run.step,
        "best_step": run.best_step,
        "train_seconds": round(seconds, 1),
        "mining_seconds": round(mining, 1),
        "peak_mib": round(peak),
        "dev": dev,
        "share": share,
        "dev_merged": merged_dev,
    }
    for other in OTHERS:
        row[f"{other}_before"] = score(run.model_folder, options.data / other, "test")
        row[f"{other}_merged"] = score(merged, options.data / other, "test")
    if options.test:
        row["test_before"] = score(run.model_folder, wordnet, "test")
        row["test_merged"] = score(merged, wordnet, "test")
    return row


def mined_source(config: TrainConfig, wordnet: Path, work: Path) -> tuple[dict[str, Any], float]:
    """The training pairs with hard negatives of the base model, and the seconds that mining took."""
    path, clock = work / "mined.jsonl", work / "mined.seconds"
    if not clock.exists():
        work.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        retriever.mine(
            config.model.name, wordnet, path, negatives=4, depth=50, max_share=MAX_SHARE, precision=precision()
        )
        clock.write_text(str(time.perf_counter() - begun))
    return {"path": str(path)}, float(clock.read_text())


def merge_with_base(
    model: Path, config: TrainConfig, wordnet: Path, options: argparse.Namespace
) -> tuple[float, float, float, Path]:
    """Merge a model with its base.

    Returns:
        The share of the trained model, its dev score before and after merging, and the folder of the merged model.
    """
    folder = options.work / "merged"
    searched = retriever.merge(
        [model, config.model.name], folder, dev=wordnet, max_queries=config.dev.max_queries, precision=precision()
    )
    found = {round(row["weights"].get(str(model), 0.0), 6): row[METRIC] for row in searched.candidates}
    allowed = [s for s, value in found.items() if s >= 0.5 and value >= max(found.values()) - options.tolerance]
    # A model that is worse than its base is not merged.
    share = min(allowed, default=1.0)
    if share < 1:
        retriever.merge([model, config.model.name], folder, weights=[share, 1 - share])
    return share, round(found[1.0], 4), round(found[share], 4), folder if share < 1 else model


def score(model: str | Path, folder: Path, split: str) -> float:
    """NDCG@10 of a model on a split."""
    loaded = retriever.load(model, precision=precision())
    with tempfile.TemporaryDirectory() as scratch:
        _, metrics = evaluate_towers(
            loaded.towers, BeirDataset.open(folder, split), Path(scratch) / "e", loaded.options, SilentReporter(), k=100
        )
    return round(metrics.mean[METRIC], 4)


def precision() -> Precision:
    """Precision of encoding."""
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


if __name__ == "__main__":
    main()
