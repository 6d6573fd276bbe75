"""Which passages of a batch are no negatives of which queries, by all pairs of texts that the data is known to hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

MAX_PAIRS_PER_QUERY = 32
MAX_PAIRS = 2**22
"""Of a batch: this many in any case (64 MiB; all pairs of 2,048 queries and passages), and so many a query on average
in large batches. Lists that are longer cost more time in the loss than an exact mask is worth."""


@dataclass(frozen=True)
class FalseNegatives:
    """What the loss is told, as in `losses.inf_cl_loss`. A query's own positive is never among them."""

    query_ids: Integers
    """[M]"""
    passage_ids: Integers
    """[N]; a passage with the id of a query is no negative of it."""
    excluded: Integers
    """[R, 2]: a query's row and the row of a passage that is no negative of it, beside those with its id."""
    masked: bool | None = None
    """Whether any of the ranks' shares has something to mask; none for a whole batch."""
    no_negatives_on_any_rank: bool | None = None
    """`no_negatives` of all ranks' shares together; none for a whole batch."""

    @property
    def any(self) -> bool:
        """Whether there is anything to mask; the same on all ranks."""
        if self.masked is not None:
            return self.masked
        return bool(len(self.excluded)) or len(np.unique(self.passage_ids)) < len(self.passage_ids)

    @property
    def no_negatives(self) -> bool:
        """Whether every passage is masked for every query, so that the batch tells nothing apart; the same on all
        ranks."""
        if self.no_negatives_on_any_rank is not None:
            return self.no_negatives_on_any_rank
        # If all pairs are known, all passages answer the same queries, and share one id.
        return bool((self.passage_ids == self.passage_ids[0]).all())


def find_false_negatives(
    queries: Integers, positives: Integers, negatives: Integers, known: Integers | None = None
) -> FalseNegatives:
    """Mask each passage of the batch for each query that it answers.

    A passage answers a query if the texts of both form a pair: one of the batch (a query with its positive), or one of
    `known`. Passages that answer the same queries of the batch share an id, the one of the queries that have such a
    passage as their positive. This covers duplicates, and all the passages of a label, without a list. The remaining
    pairs are listed in `excluded`. If they are more than MAX_PAIRS, and more than MAX_PAIRS_PER_QUERY times the
    queries, ids become connected components of the graph of pairs instead: still no passage is a negative of a query
    that it answers, but some passages that do not answer a query are left out too, and in the worst case all.

    Args:
        queries, positives: [M] integers, equal for equal texts.
        negatives: [N − M] integers of the hard negatives; the passages are the positives, then these.
        known: [K, 2] pairs of a query's and a passage's integer; texts that are not in the batch may be among them.
    """
    query_texts, query = np.unique(queries, return_inverse=True)
    passage_texts, passage = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
    pairs = query * len(passage_texts) + passage[: len(query)]
    if known is not None and len(known):
        found_query, is_query = _places(query_texts, known[:, 0])
        found_passage, is_passage = _places(passage_texts, known[:, 1])
        inside = is_query & is_passage
        pairs = np.concatenate([pairs, found_query[inside] * len(passage_texts) + found_passage[inside]])
    of_query, of_passage = np.divmod(np.unique(pairs), max(1, len(passage_texts)))

    classes = _classes(of_query, of_passage, len(query_texts), len(passage_texts))
    passage_ids = classes[passage]
    query_ids = passage_ids[: len(query)]
    count = int(classes.max(initial=-1)) + 1
    # Pairs of query texts and classes, sorted by query.
    of_query, of_class = np.divmod(np.unique(of_query * count + classes[of_passage]), max(1, count))
    most = max(MAX_PAIRS, MAX_PAIRS_PER_QUERY * len(query))
    excluded = _excluded_pairs(of_query, of_class, query, query_ids, passage_ids, most)
    if excluded is None:
        component = _components(of_query, of_class, len(query_texts), count)
        return FalseNegatives(component[query_ids], component[passage_ids], np.empty((0, 2), np.int64))
    return FalseNegatives(query_ids, passage_ids, excluded)


def normalize_whitespace(text: str) -> str:
    """What is compared of a text: copies of one often differ in spaces and line ends alone."""
    return " ".join(text.split())


def numbered(texts: Iterable[str]) -> Integers:
    """Texts that are equal but for spacing get equal numbers, counted from 0."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(normalize_whitespace(text), len(numbers)) for text in texts], dtype=np.int64)


def _places(values: Integers, wanted: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Where the wanted ones stand among sorted values, and whether they do."""
    place = np.searchsorted(values, wanted)
    place[place == len(values)] = 0
    return place, values[place] == wanted if len(values) else np.zeros(len(wanted), bool)


def _classes(of_query: Integers, of_passage: Integers, queries: int, passages: int) -> Integers:
    """[passages]: equal for passages that answer the same queries; one of its own for each that answers none."""
    # The sum of random numbers stands for a set of queries. Two sets share theirs once in 2^64.
    weights = np.random.default_rng(0).integers(2**64, size=queries, dtype=np.uint64)
    sums = np.zeros(passages, dtype=np.uint64)
    np.add.at(sums, of_passage, weights[of_query])
    answers = np.bincount(of_passage, minlength=passages) > 0
    classes = np.empty(passages, dtype=np.int64)
    known, classes[answers] = np.unique(sums[answers], return_inverse=True)
    classes[~answers] = len(known) + np.arange(passages - np.count_nonzero(answers))
    return classes


def _excluded_pairs(
    of_query: Integers, of_class: Integers, query: Integers, query_ids: Integers, passage_ids: Integers, most: int
) -> Integers | None:
    """[R, 2]: each query's row with the rows of passages of its other classes; None if they are more than `most`."""
    starts = np.searchsorted(of_query, query)
    counts = np.searchsorted(of_query, query, side="right") - starts
    if int(counts.sum()) - len(query) > most:
        return None
    rows = np.repeat(np.arange(len(query)), counts)
    classes = of_class[ranges(starts, counts)]
    other = classes != query_ids[rows]
    rows, classes = rows[other], classes[other]
    order = np.argsort(passage_ids, kind="stable")
    ordered = passage_ids[order]
    starts = np.searchsorted(ordered, classes)
    counts = np.searchsorted(ordered, classes, side="right") - starts
    if int(counts.sum()) > most:
        return None
    return np.stack([np.repeat(rows, counts), order[ranges(starts, counts)]], axis=1).astype(np.int64)


def ranges(starts: Integers, counts: Integers) -> Integers:
    """The numbers from each start on, as many as its count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _components(of_query: Integers, of_class: Integers, queries: int, classes: int) -> Integers:
    """[classes]: the number of the connected component that a class belongs to."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (of_query, queries + of_class)
    size = queries + classes
    graph = coo_array((np.ones(len(of_query), dtype=np.int8), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1][queries:].astype(np.int64)


def rank_slices(counts: Sequence[int]) -> list[slice]:
    """The rows of each rank, where shards of so many rows lie one after another."""
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
