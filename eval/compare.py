"""Two or more systems on the same queries: who is better, by how much, by more than chance, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from eval.metrics import Metrics, PerQuery, Qrels
from eval.ranking import RankedRun
from eval.significance import PERMUTATIONS, PairedTest, holm, paired_test
from index.files import InputError
from index.passages import Passage, one_line


@dataclass(frozen=True)
class Pair:
    """System b against system a, by one measure."""

    a: str
    b: str
    measure: str
    mean_a: float
    mean_b: float
    test: PairedTest
    p_corrected: float
    """The randomisation test's p-value, corrected by Holm for the pairs that were tested together."""


@dataclass(frozen=True)
class ShownPassage:
    """A passage of a query that changed: what it is, and where each system has it."""

    id: str
    text: str
    grade: int | None
    """None: not judged."""
    rank_a: int | None
    rank_b: int | None
    """From 1; None: not in the run."""


@dataclass(frozen=True)
class ChangedQuery:
    """A query on which two systems differ much."""

    id: str
    text: str
    value_a: float
    value_b: float
    passages: list[ShownPassage]
    """The first passages of both, and the relevant ones."""


def values_of(metrics: Metrics, measure: str, name: str = "metrics") -> np.ndarray:
    """One measure by query, float64 [Q], in the order of the qrels.

    Raises:
        InputError: the measure was not computed.
    """
    if measure not in metrics.mean:
        raise InputError(f"{name}: expected one of {', '.join(metrics.mean)}, found {measure}")
    if isinstance(metrics.per_query, PerQuery):
        return metrics.per_query.column(measure)
    return np.array([row[measure] for row in metrics.per_query.values()], dtype=np.float64)


def compare(
    systems: Mapping[str, Metrics],
    measure: str = "ndcg@10",
    *,
    baseline: str | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Pair]:
    """Test the systems against each other, paired by query.

    Args:
        systems: name -> metrics over the same queries.
        measure: what they are compared by.
        baseline: test each system against this one only; by default every pair is tested. Fewer tests are corrected
            for less.
        permutations: of the randomisation test.
        seed: of the randomisation test.

    Returns:
        A pair for every test, in the systems' order; none for fewer than two systems or queries.

    Raises:
        InputError: the measure or the baseline is not there, or the systems were scored on different queries.
    """
    names = list(systems)
    if baseline is not None and baseline not in systems:
        raise InputError(f"baseline: expected one of {', '.join(names)}, found {baseline}")
    values = {name: values_of(metrics, measure, name) for name, metrics in systems.items()}
    for name in names[1:]:
        if list(systems[name].per_query) != list(systems[names[0]].per_query):
            raise InputError(f"{name}: expected the queries of {names[0]} in their order, found others")
    if len(names) < 2 or len(values[names[0]]) < 2:
        return []
    if baseline is None:
        wanted = list(combinations(names, 2))
    else:
        wanted = [(baseline, name) for name in names if name != baseline]
    tests = [paired_test(values[a], values[b], permutations=permutations, seed=seed) for a, b in wanted]
    corrected = holm([test.p_randomisation for test in tests])
    return [
        Pair(a, b, measure, systems[a].mean[measure], systems[b].mean[measure], test, p)
        for (a, b), test, p in zip(wanted, tests, corrected, strict=True)
    ]


def most_changed(a: Metrics, b: Metrics, measure: str, count: int) -> tuple[list[str], list[str]]:
    """The queries that b improves most and those that it worsens most, at most `count` each, largest change first.

    Equal changes go by the order of the qrels.
    """
    difference = values_of(b, measure) - values_of(a, measure)
    queries = list(a.per_query)
    order = np.argsort(-difference, kind="stable")
    better = [queries[place] for place in order[:count].tolist() if difference[place] > 0]
    order = np.argsort(difference, kind="stable")
    worse = [queries[place] for place in order[:count].tolist() if difference[place] < 0]
    return better, worse


def passages_to_show(
    query: str, qrels: Qrels, a: RankedRun, b: RankedRun, *, top: int = 2, relevant: int = 2
) -> list[tuple[str, int | None, int | None]]:
    """(passage id, rank in a, rank in b) of the passages that explain a change: the first of both, and relevant ones.

    Of the relevant passages those with the highest grade, then those ranked best by either system.
    """
    ranks_a, ranks_b = _ranks(a, query), _ranks(b, query)
    unranked = max(len(ranks_a), len(ranks_b)) + 1

    def best(passage: str) -> int:
        return min(ranks_a.get(passage, unranked), ranks_b.get(passage, unranked))

    graded = {passage: grade for passage, grade in qrels[query].items() if grade > 0}
    shown = sorted(graded, key=lambda passage: (-graded[passage], best(passage), passage))[:relevant]
    shown += [passage for ranks in (ranks_a, ranks_b) for passage in list(ranks)[:top]]
    ordered = sorted(dict.fromkeys(shown), key=best)
    return [(passage, ranks_a.get(passage), ranks_b.get(passage)) for passage in ordered]


def _ranks(run: RankedRun, query: str) -> dict[str, int]:
    found = run[query] if run.place(query) is not None else {}
    return {passage: rank for rank, passage in enumerate(found, start=1)}


def changed_queries(
    wanted: Sequence[str],
    queries: Mapping[str, str],
    qrels: Qrels,
    metrics: tuple[Metrics, Metrics],
    runs: tuple[RankedRun, RankedRun],
    measure: str,
    texts: Mapping[str, str],
) -> list[ChangedQuery]:
    """What is shown of the `wanted` queries; `texts` holds those of `passages_to_show`.

    A run of another program may answer a query that is judged but has no text here.
    """
    found = []
    for query in wanted:
        passages = [
            ShownPassage(passage, texts.get(passage, ""), qrels[query].get(passage), rank_a, rank_b)
            for passage, rank_a, rank_b in passages_to_show(query, qrels, *runs)
        ]
        value_a, value_b = (found_by.per_query[query][measure] for found_by in metrics)
        found.append(ChangedQuery(query, queries.get(query, ""), value_a, value_b, passages))
    return found


def texts_of(passages: Iterable[Passage], wanted: set[str], length: int = 300) -> dict[str, str]:
    """The beginnings of the wanted passages' texts, in one pass over the corpus; no more than them is held."""
    return {
        passage.id: shorten(one_line(passage.title, passage.text), length)
        for passage in passages
        if passage.id in wanted
    }


def shorten(text: str, length: int) -> str:
    """On one line, and cut at a word where it is longer than `length`."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return text[:length].rsplit(" ", 1)[0].rstrip(",;:.") + " …"
