"""Towers on BEIR folders: encode, search, score, report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.beir import BeirDataset
from eval.evaluate import evaluate_beir
from eval.metrics import KS, Metrics
from eval.ranking import RankedRun
from eval.report import write_report
from eval.runs import write_trec_run
from index.files import InputError
from retriever.config import DevConfig
from retriever.encode import EncodeOptions, corpus_source
from retriever.encode_files import embed_corpus, embed_queries, ticking
from retriever.progress import Terminal
from retriever.towers import Towers


def evaluate_towers(
    towers: Towers,
    dataset: BeirDataset,
    embeddings: Path,
    options: EncodeOptions,
    terminal: Terminal,
    *,
    k: int = 1000,
    tick: Callable[[], None] | None = None,
) -> tuple[RankedRun, Metrics]:
    """Embed a BEIR corpus to the store `embeddings` (continued or reused if it is there) and score the split.

    Args:
        towers: in evaluation mode, on the device to use.
        k: passages a query in the run.
        tick: called after every micro-batch; may raise to end the evaluation.
    """
    store = embed_corpus(towers, dataset.corpus_file, embeddings, options, terminal, tick=tick)
    with terminal.bar(f"{dataset.name}: search", store.rows, "passages") as advance:
        return evaluate_beir(
            dataset,
            store=store,
            embed_queries=lambda texts: embed_queries(towers, texts, options, terminal, tick=tick),
            k=k,
            ks=KS,
            device=str(towers.device),
            progress=ticking(advance, tick),
        )


def evaluate_to_report(
    towers: Towers,
    folders: list[Path],
    out: Path,
    options: EncodeOptions,
    terminal: Terminal,
    *,
    split: str = "test",
    k: int = 1000,
    details: dict[str, Any],
) -> dict[str, Metrics]:
    """Evaluate on each BEIR folder and write into `out`, a folder for each data set.

    OUT/NAME/embeddings/, OUT/NAME/run.trec, OUT/report.json, OUT/report.md and OUT/report.png.

    Args:
        details: what else the report should say about how the numbers came to be, the model among it.
    """
    datasets = [BeirDataset.open(folder, split) for folder in folders]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise InputError(f"expected data folders of different names, found {', '.join(names)}")
    for dataset in datasets:
        # Before hours of encoding, not after.
        dataset.check(passage.id for passage in dataset.passages())
    results = {}
    for dataset in datasets:
        place = out / dataset.name
        run, results[dataset.name] = evaluate_towers(towers, dataset, place / "embeddings", options, terminal, k=k)
        write_trec_run(place / "run.trec", run, "retriever")
    how = {
        **details,
        "model sha256": towers.fingerprint()["sha256"],
        "split": split,
        **dataclasses.asdict(options),
        "search": f"exact, inner product, {k} passages a query",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    write_report(out, results, title=f"{', '.join(names)} ({split})", details=how, head="data")
    return results


def open_dev(config: DevConfig) -> BeirDataset | None:
    """The split that a training run is evaluated on, cut to its first queries if so configured; none without a path."""
    if not config.path:
        return None
    dataset = BeirDataset.open(config.path, config.split)
    # Now rather than after the first hundred steps.
    dataset.check(passage.id for passage in dataset.passages())
    if config.max_queries is None:
        return dataset
    kept = sorted(dataset.qrels)[: config.max_queries]
    return dataclasses.replace(
        dataset,
        queries={query: dataset.queries[query] for query in kept},
        qrels={query: dataset.qrels[query] for query in kept},
    )


def dev_fingerprint(dev: BeirDataset | None) -> str:
    """What the best score of a run was measured on."""
    if dev is None:
        return ""
    judged = json.dumps([dev.queries, dev.qrels], sort_keys=True)
    return f"{corpus_source(dev.corpus_file)['sha256']} {hashlib.sha256(judged.encode()).hexdigest()}"
