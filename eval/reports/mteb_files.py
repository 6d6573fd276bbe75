"""Results as files of MTEB (https://github.com/embeddings-benchmark/mteb), one for each set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.metrics import Metrics
from eval.sets.plan import FORUMS
from index.files import write_json

MTEB = "mteb"
"""Name of the folder in a report."""
# MTEB's names of BEIR's sets.
TASKS = {
    "msmarco": "MSMARCO",
    "trec-covid": "TRECCOVID",
    "nfcorpus": "NFCorpus",
    "nq": "NQ",
    "hotpotqa": "HotpotQA",
    "fiqa": "FiQA2018",
    "arguana": "ArguAna",
    "webis-touche2020": "Touche2020",
    "quora": "QuoraRetrieval",
    "dbpedia-entity": "DBPedia",
    "scidocs": "SCIDOCS",
    "fever": "FEVER",
    "climate-fever": "ClimateFEVER",
    "scifact": "SciFact",
    **{f"cqadupstack/{forum}": f"CQADupstack{forum.capitalize()}Retrieval" for forum in FORUMS},
}
# Our measures that MTEB has, too.
MEASURES = ("ndcg", "map", "recall", "precision", "mrr")


def write_mteb_file(
    folder: Path, name: str, split: str, metrics: Metrics, data: Mapping[str, str], seconds: float
) -> Path:
    """Write the result on one set as a task result of MTEB.

    The set is the one that was evaluated, not MTEB's copy of it: the revision is the checksum of its judgements, and no
    version of MTEB is named.

    Args:
        folder: the folder of the report; the file is in its folder `mteb`.
        name: name of the set; a set that MTEB does not have keeps it.
        split: the split.
        metrics: the metrics of exact search.
        data: checksums of the set, see `data_checksums`.
        seconds: duration of the evaluation.

    Returns:
        The file.
    """
    scores: dict[str, Any] = {}
    for measure, value in metrics.mean.items():
        kind, _, cut = measure.partition("@")
        if kind in MEASURES:
            scores[f"{kind}_at_{cut}"] = round(value, 5)
    scores["main_score"] = scores.get("ndcg_at_10", 0.0)
    scores |= {"hf_subset": "default", "languages": ["eng-Latn"]}
    task = TASKS.get(name, name.replace("/", "-"))
    content = {
        "dataset_revision": f"qrels-sha256-{data['qrels sha256'][:16]}",
        "task_name": task,
        "mteb_version": None,
        "scores": {split: [scores]},
        "evaluation_time": round(seconds, 3),
        "kg_co2_emissions": None,
    }
    path = folder / MTEB / f"{task}.json"
    write_json(path, content)
    return path
