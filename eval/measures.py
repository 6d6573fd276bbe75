"""How measures are named in print, and which of them a report shows first."""

from __future__ import annotations

from collections.abc import Iterable

HEADLINE = ("ndcg@10", "recall@100", "mrr@10", "map@100", "precision@10")
PLOTTED = ("ndcg@10", "recall@100")
NAMES = {
    "ndcg": "nDCG",
    "map": "MAP",
    "recall": "recall",
    "precision": "precision",
    "mrr": "MRR",
    "rcap": "R-cap",
    "success": "success",
}


def measure_name(measure: str) -> str:
    """How a measure is printed: "ndcg@10" -> "nDCG@10"."""
    name, _, k = measure.partition("@")
    return f"{NAMES.get(name, name)}@{k}"


def cutoffs(measures: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names and the cut-offs of measures ("ndcg@10"), each once, in the order found."""
    found = [measure.partition("@") for measure in measures]
    return list(dict.fromkeys(name for name, _, _ in found)), list(dict.fromkeys(k for _, _, k in found))
