"""Groups of queries that share positives, and the choice of the groups for the dev and the test set."""

from __future__ import annotations

import hashlib
import math
import numbers

import numpy as np
import numpy.typing as npt

from retriever.data.false_negatives import Integers
from retriever.errors import ConfigError

Digests = npt.NDArray[np.uint64]
"""uint64 array: 64 bits of BLAKE2b of each text."""

TRAIN, DEV, TEST = 0, 1, 2
DEFAULT_SHARE = 0.05
DEFAULT_MAX_QUERIES = 1000


def check_size(name: str, size: int | float | None) -> None:
    """Check the size of a dev or test set.

    Args:
        name: Name of the argument in messages.
        size: A number of queries, 0 for none; or a fraction of all queries in (0, 1); or None for the default.

    Raises:
        ConfigError: If the size is anything else.
    """
    is_integer = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    is_fraction = isinstance(size, numbers.Real) and not is_integer
    if size is None or (is_integer and size >= 0) or (is_fraction and 0 < size < 1):
        return
    raise ConfigError(f"{name}: expected a whole number of queries, or a share above 0 and below 1, found {size!r}")


def resolve_size(size: int | float | None, queries: int) -> int:
    """Return the number of queries for a size, at least 1 unless the size is 0.

    Args:
        size: As in `check_size`. None: 5 % of the queries, at most 1,000.
        queries: Number of all queries.
    """
    if size is None:
        return max(1, min(DEFAULT_MAX_QUERIES, math.floor(DEFAULT_SHARE * queries)))
    if isinstance(size, numbers.Integral):
        return int(size)
    # The small constant compensates for rounding: 0.29 of 100 is 29.
    return max(1, math.floor(float(size) * queries + 1e-9))


def connected_groups(queries: Digests, pair_queries: Integers, passages: Digests) -> Integers:
    """Return the connected components of queries: two queries are in one group if pairs connect them.

    A text that is the query of one pair and the passage of another connects these pairs as well.

    Args:
        queries: [Q], distinct and sorted.
        pair_queries: [P], the position in `queries` of each pair's query.
        passages: [P], the positive of each pair. Pairs are distinct.

    Returns:
        [Q] group numbers, from 0.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    texts = np.unique(np.concatenate([queries, passages]))
    position = np.searchsorted(texts, queries)
    edges = (position[pair_queries], np.searchsorted(texts, passages))
    graph = coo_matrix((np.ones(len(passages), np.int8), edges), shape=(len(texts), len(texts)))
    _, component = connected_components(graph, directed=False)
    return np.unique(component[position], return_inverse=True)[1].astype(np.int64)


def choose_splits(groups: Integers, queries: Digests, dev: int, test: int, seed: int) -> npt.NDArray[np.int8]:
    """Assign groups of queries to splits at random, so that the sizes are as close as possible to the requested ones.

    The result depends only on the texts of the queries, the sizes and the seed. The test set does not depend on `dev`.
    Groups larger than a tenth of a set are drawn only if smaller ones do not fill it.

    Args:
        groups: [Q] group numbers, from 0.
        queries: [Q] digests of the queries.
        dev: Requested number of dev queries.
        test: Requested number of test queries.
        seed: Seed of the random choice.

    Returns:
        [Q] TRAIN, DEV or TEST.
    """
    sizes = np.bincount(groups)
    order = np.full(len(sizes), np.iinfo(np.uint64).max)
    np.minimum.at(order, groups, _random(queries, seed))
    splits = np.full(len(sizes), TRAIN, np.int8)
    for split, size in ((TEST, test), (DEV, dev)):
        remaining = np.flatnonzero(splits == TRAIN)
        splits[remaining[_draw(sizes[remaining], order[remaining], size)]] = split
    return splits[groups]


def is_large_enough(count: int, requested: int) -> bool:
    """Whether `count` queries are at least half of the requested number. (`choose_splits` gives at most twice.)"""
    return requested <= 2 * count


def _draw(sizes: Integers, order: Digests, requested: int) -> list[int]:
    """Return the numbers of groups whose sizes add up to about `requested`."""
    candidates = np.lexsort((order, sizes > max(1, requested // 10)))
    drawn, too_large, missing = [], [], requested
    for group, size in zip(candidates.tolist(), sizes[candidates].tolist(), strict=True):
        if not missing:
            break
        if size <= missing:
            drawn.append(group)
            missing -= size
        else:
            too_large.append(group)
    if missing and too_large:
        # Exceeding the size by the smallest group may be closer than falling short of it.
        smallest = min(too_large, key=lambda group: sizes[group])
        if sizes[smallest] - missing <= missing:
            drawn.append(smallest)
    return drawn


def _random(queries: Digests, seed: int) -> Digests:
    """Return a pseudorandom number for each query: its digest and that of the seed, mixed by SplitMix64."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = queries ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
