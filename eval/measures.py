"""How measures are named in print, and which of them a report shows first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

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


def shown(wanted: Sequence[str], found: Collection[str]) -> list[str]:
    """Those of the `wanted` measures that were found; where runs are not that deep, at the deepest cut-off there is."""
    return list(dict.fromkeys(measure for one in wanted if (measure := _deepest(one, found)) is not None))


def _deepest(wanted: str, found: Collection[str]) -> str | None:
    name, _, k = wanted.partition("@")
    depths = [int(measure.partition("@")[2]) for measure in found if measure.partition("@")[0] == name]
    depth = max((depth for depth in depths if depth <= int(k)), default=None)
    return None if depth is None else f"{name}@{depth}"


def cutoffs(measures: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names and the cut-offs of measures ("ndcg@10"), each once, in the order found."""
    found = [measure.partition("@") for measure in measures]
    return list(dict.fromkeys(name for name, _, _ in found)), list(dict.fromkeys(k for _, _, k in found))
