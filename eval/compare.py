"""Pairwise comparison of systems on the same queries: significance tests and the queries that changed most."""

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
    """The comparison of system b with system a by one measure."""

    a: str
    b: str
    measure: str
    mean_a: float
    mean_b: float
    test: PairedTest
    p_corrected: float
    """p-value of the randomization test after Holm's correction over all pairs tested together."""


@dataclass(frozen=True)
class ShownPassage:
    """A passage that explains a change, with its rank in both systems."""

    id: str
    text: str
    grade: int | None
    """None if not judged."""
    rank_a: int | None
    rank_b: int | None
    """Ranks from 1; None if not in the run."""


@dataclass(frozen=True)
class ChangedQuery:
    """A query whose value differs most between two systems."""

    id: str
    text: str
    value_a: float
    value_b: float
    passages: list[ShownPassage]
    """The top passages of both systems, and relevant passages."""


def values_of(metrics: Metrics, measure: str, name: str = "metrics") -> np.ndarray:
    """The values of one measure by query, float64 [Q], in the order of the qrels.

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
    """Test systems pairwise with the paired t-test and the paired randomization test.

    The p-values of the randomization test are corrected with Holm's method over all tested pairs.

    Args:
        systems: name -> metrics over the same queries.
        measure: the measure to compare.
        baseline: compare each system with this one only, which leaves fewer tests to correct for; by default every
            pair is tested.
        permutations: number of permutations of the randomization test.
        seed: seed of the randomization test.

    Returns:
        One result per pair, in the order of `systems`; an empty list for fewer than two systems or queries.

    Raises:
        InputError: the measure or the baseline does not exist, or the systems were scored on different queries.
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
    """The ids of the queries that b improves most and worsens most, at most `count` each, largest change first.

    Equal changes keep the order of the qrels.
    """
    difference = values_of(b, measure) - values_of(a, measure)
    queries = list(a.per_query)
    order = np.argsort(-difference, kind="stable")
    better = [queries[position] for position in order[:count].tolist() if difference[position] > 0]
    order = np.argsort(difference, kind="stable")
    worse = [queries[position] for position in order[:count].tolist() if difference[position] < 0]
    return better, worse


def passages_to_show(
    query: str, qrels: Qrels, a: RankedRun, b: RankedRun, *, top: int = 2, relevant: int = 2
) -> list[tuple[str, int | None, int | None]]:
    """The passages that explain a change, as (passage id, rank in a, rank in b), best rank first.

    Args:
        query: the query id.
        qrels: the judgements.
        a: the run of the first system.
        b: the run of the second system.
        top: number of top passages of each system.
        relevant: number of relevant passages: highest grade first, then best rank in either system.
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
    found = run[query] if run.position(query) is not None else {}
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
    """Collect the queries `wanted` with their passages, for a report.

    Args:
        wanted: query ids.
        queries: query id -> text; a judged query may lack a text.
        qrels: the judgements.
        metrics: metrics of both systems.
        runs: runs of both systems.
        measure: the measure that changed.
        texts: passage id -> text of the passages of `passages_to_show`.
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
    """Passage id -> text of the `wanted` passages, shortened to `length` characters; reads the corpus once."""
    return {
        passage.id: shorten(one_line(passage.title, passage.text), length)
        for passage in passages
        if passage.id in wanted
    }


def shorten(text: str, length: int) -> str:
    """The text on one line, truncated at a word boundary if it is longer than `length` characters."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return text[:length].rsplit(" ", 1)[0].rstrip(",;:.") + " …"
