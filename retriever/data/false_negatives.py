"""False negatives of a batch, found from all known pairs of a query and a positive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

MAX_PAIRS = 2**22
"""Number of excluded pairs that a batch may always have: 64 MiB, all pairs of 2,048 queries and passages."""
MAX_PAIRS_PER_QUERY = 32
"""Mean number of excluded pairs per query in larger batches. Longer lists would slow down the loss too much."""


@dataclass(frozen=True)
class FalseNegatives:
    """Masks for the loss, the arguments of `losses.inf_cl_loss`. A query's own positive is never masked."""

    query_ids: Integers
    """[M]"""
    passage_ids: Integers
    """[N]. A passage with the id of a query is not a negative of that query."""
    excluded: Integers
    """[R, 2]: pairs (row of a query, row of a passage) of further false negatives, with different ids."""
    batch_any: bool | None = None
    """`any` of the whole batch, if this is the share of one rank; otherwise None."""
    batch_no_negatives: bool | None = None
    """`no_negatives` of the whole batch, if this is the share of one rank; otherwise None."""

    own_masked: int | None = None
    """Number of masked pairs of these queries, if this is the share of one rank; otherwise None."""

    def count(self, positive_pairs: Integers | None = None) -> int:
        """Return the number of masked pairs of these queries.

        Args:
            positive_pairs: [P, 2] pairs that are not masked, because they are further positives, with rows of these
                passages. Default: None. Ignored for a share, for which `own_masked` is the result.
        """
        if self.own_masked is not None:
            return self.own_masked
        return count_masked(self.query_ids, self.passage_ids, self.excluded, self.passage_ids, positive_pairs)

    @property
    def any(self) -> bool:
        """Whether the batch has a false negative; the same on all ranks."""
        if self.batch_any is not None:
            return self.batch_any
        return bool(len(self.excluded)) or len(np.unique(self.passage_ids)) < len(self.passage_ids)

    def without(self, pairs: Integers) -> FalseNegatives:
        """The masks without some pairs [P, 2] of `excluded`, because they are further positives in the loss."""
        width = max(int(array[:, 1].max(initial=-1)) for array in (self.excluded, pairs)) + 1
        keys, removed = (array[:, 0] * width + array[:, 1] for array in (self.excluded, pairs))
        return replace(self, excluded=self.excluded[~np.isin(keys, removed)])

    @property
    def no_negatives(self) -> bool:
        """Whether every passage of the batch is masked for every query; the same on all ranks."""
        if self.batch_no_negatives is not None:
            return self.batch_no_negatives
        # If all pairs are known, all passages have the same queries and therefore the same id.
        return bool((self.passage_ids == self.passage_ids[0]).all())


def count_masked(
    query_ids: Integers,
    pool_ids: Integers,
    excluded: Integers,
    passage_ids: Integers,
    positive_pairs: Integers | None,
) -> int:
    """Return the number of pairs that ids and `excluded` mask.

    Args:
        query_ids: [M] of some queries.
        pool_ids: [N] of all passages.
        excluded: [R, 2] pairs of these queries.
        passage_ids: Those of the passages in `positive_pairs`.
        positive_pairs: [P, 2] pairs that are not masked, or None.
    """
    size = max(int(pool_ids.max(initial=-1)), int(query_ids.max(initial=-1))) + 1
    same = int(np.bincount(pool_ids, minlength=size)[query_ids].sum()) - len(query_ids)
    positives = 0
    if positive_pairs is not None:
        positives = int((query_ids[positive_pairs[:, 0]] == passage_ids[positive_pairs[:, 1]]).sum())
    return same + len(excluded) - positives


def find_false_negatives(
    queries: Integers, positives: Integers, negatives: Integers, known: Integers | None = None
) -> FalseNegatives:
    """Find the passages of a batch that are positives of further queries.

    A passage is a positive of a query if their texts form a pair of the batch (a query and its positive) or of `known`.
    Passages with the same set of queries get the same id, which is also the id of the queries that have such a passage
    as their positive. This covers duplicates and all passages of a label without a list of pairs. The remaining pairs
    are listed in `excluded`.

    If there are more than MAX_PAIRS remaining pairs, and more than MAX_PAIRS_PER_QUERY times the number of queries, the
    ids are connected components of the graph of pairs instead. All false negatives are masked then as well, but some
    true negatives are masked too, in the worst case all.

    Args:
        queries: [M] integers, equal for equal texts.
        positives: [M] integers, equal for equal texts.
        negatives: [N − M] integers of the hard negatives. The passages are the positives followed by the negatives.
        known: [K, 2] pairs of the integers of a query and a passage, which need not be in the batch. Default: None.
    """
    query_texts, query = np.unique(queries, return_inverse=True)
    passage_texts, passage = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
    pairs = query * len(passage_texts) + passage[: len(query)]
    if known is not None and len(known):
        known_query, has_query = _positions(query_texts, known[:, 0])
        known_passage, has_passage = _positions(passage_texts, known[:, 1])
        in_batch = has_query & has_passage
        pairs = np.concatenate([pairs, known_query[in_batch] * len(passage_texts) + known_passage[in_batch]])
    pair_query, pair_passage = np.divmod(np.unique(pairs), max(1, len(passage_texts)))

    classes = _classes(pair_query, pair_passage, len(query_texts), len(passage_texts))
    passage_ids = classes[passage]
    query_ids = passage_ids[: len(query)]
    count = int(classes.max(initial=-1)) + 1
    # Pairs of query texts and classes, sorted by query.
    pair_query, pair_class = np.divmod(np.unique(pair_query * count + classes[pair_passage]), max(1, count))
    max_pairs = max(MAX_PAIRS, MAX_PAIRS_PER_QUERY * len(query))
    excluded = _excluded_pairs(pair_query, pair_class, query, query_ids, passage_ids, max_pairs)
    if excluded is None:
        component = _components(pair_query, pair_class, len(query_texts), count)
        return FalseNegatives(component[query_ids], component[passage_ids], np.empty((0, 2), np.int64))
    return FalseNegatives(query_ids, passage_ids, excluded)


def normalize_whitespace(text: str) -> str:
    """Return a text with runs of white space replaced by one space. Duplicates often differ only in white space."""
    return " ".join(text.split())


def number_texts(texts: Iterable[str]) -> Integers:
    """Number texts from 0. Texts that differ only in white space get the same number."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(normalize_whitespace(text), len(numbers)) for text in texts], dtype=np.int64)


def _positions(sorted_values: Integers, values: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Return the positions of `values` in `sorted_values`, and whether each is there."""
    positions = np.searchsorted(sorted_values, values)
    positions[positions == len(sorted_values)] = 0
    is_there = sorted_values[positions] == values if len(sorted_values) else np.zeros(len(values), bool)
    return positions, is_there


def _classes(pair_query: Integers, pair_passage: Integers, queries: int, passages: int) -> Integers:
    """Return class numbers [passages], equal for passages with the same set of queries; unique if the set is empty."""
    # A set is represented by the sum of random numbers of its queries. Two sets collide with probability 2^-64.
    weights = np.random.default_rng(0).integers(2**64, size=queries, dtype=np.uint64)
    sums = np.zeros(passages, dtype=np.uint64)
    np.add.at(sums, pair_passage, weights[pair_query])
    has_query = np.bincount(pair_passage, minlength=passages) > 0
    classes = np.empty(passages, dtype=np.int64)
    distinct, classes[has_query] = np.unique(sums[has_query], return_inverse=True)
    classes[~has_query] = len(distinct) + np.arange(passages - np.count_nonzero(has_query))
    return classes


def _excluded_pairs(
    pair_query: Integers,
    pair_class: Integers,
    query: Integers,
    query_ids: Integers,
    passage_ids: Integers,
    max_pairs: int,
) -> Integers | None:
    """Return pairs [R, 2] of query rows and passage rows of the query's other classes; None if R > `max_pairs`."""
    starts = np.searchsorted(pair_query, query)
    counts = np.searchsorted(pair_query, query, side="right") - starts
    if int(counts.sum()) - len(query) > max_pairs:
        return None
    rows = np.repeat(np.arange(len(query)), counts)
    classes = pair_class[concatenated_ranges(starts, counts)]
    other = classes != query_ids[rows]
    rows, classes = rows[other], classes[other]
    order = np.argsort(passage_ids, kind="stable")
    ordered = passage_ids[order]
    starts = np.searchsorted(ordered, classes)
    counts = np.searchsorted(ordered, classes, side="right") - starts
    if int(counts.sum()) > max_pairs:
        return None
    return np.stack([np.repeat(rows, counts), order[concatenated_ranges(starts, counts)]], axis=1).astype(np.int64)


def concatenated_ranges(starts: Integers, counts: Integers) -> Integers:
    """Concatenate the ranges start, …, start + count − 1."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _components(pair_query: Integers, pair_class: Integers, queries: int, classes: int) -> Integers:
    """Return the number of the connected component of each class, [classes]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (pair_query, queries + pair_class)
    size = queries + classes
    graph = coo_array((np.ones(len(pair_query), dtype=np.int8), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1][queries:].astype(np.int64)


def rank_slices(counts: Sequence[int]) -> list[slice]:
    """Return the rows of each rank in a concatenation of shards with these numbers of rows."""
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
