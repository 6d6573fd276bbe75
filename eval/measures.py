"""Printed names of the measures, and the measures that a report shows first."""

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
    """The printed name of a measure: "ndcg@10" -> "nDCG@10"."""
    name, _, k = measure.partition("@")
    return f"{NAMES.get(name, name)}@{k}"


def shown(wanted: Sequence[str], found: Collection[str]) -> list[str]:
    """The `wanted` measures that exist in `found`, each at the deepest available cut-off up to the wanted one."""
    return list(dict.fromkeys(measure for one in wanted if (measure := _deepest(one, found)) is not None))


def _deepest(wanted: str, found: Collection[str]) -> str | None:
    name, _, k = wanted.partition("@")
    depths = [int(measure.partition("@")[2]) for measure in found if measure.partition("@")[0] == name]
    depth = max((depth for depth in depths if depth <= int(k)), default=None)
    return None if depth is None else f"{name}@{depth}"


def cutoffs(measures: Iterable[str]) -> tuple[list[str], list[str]]:
    """The distinct names and cut-offs of measures such as "ndcg@10", in order of occurrence."""
    found = [measure.partition("@") for measure in measures]
    return list(dict.fromkeys(name for name, _, _ in found)), list(dict.fromkeys(k for _, _, k in found))
