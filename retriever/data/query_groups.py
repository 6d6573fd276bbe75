"""Groups of queries that share positive passages, and the choice of the groups that become the dev and the test set."""

from __future__ import annotations

import hashlib
import math
import numbers

import numpy as np
import numpy.typing as npt

from retriever.data.false_negatives import Integers
from retriever.errors import ConfigError

Digests = npt.NDArray[np.uint64]
"""64 bits of BLAKE2b of each text."""

TRAIN, DEV, TEST = 0, 1, 2
DEFAULT_SHARE = 0.05
DEFAULT_MAX_QUERIES = 1000


def check_size(name: str, size: int | float | None) -> None:
    """Refuse a size that is neither a number of queries (0 for none), nor a share of them, nor left open.

    Raises:
        ConfigError: it is something else; `name` is named.
    """
    whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    if size is None or (whole and size >= 0) or (isinstance(size, numbers.Real) and not whole and 0 < size < 1):
        return
    raise ConfigError(f"{name}: expected a whole number of queries, or a share above 0 and below 1, found {size!r}")


def resolve_size(size: int | float | None, queries: int) -> int:
    """The number of queries that a size asks for: at least 1, unless it is 0."""
    if size is None:
        return max(1, min(DEFAULT_MAX_QUERIES, math.floor(DEFAULT_SHARE * queries)))
    if isinstance(size, numbers.Integral):
        return int(size)
    # 0.29 of 100 is 29, whatever the rounding of the product.
    return max(1, math.floor(float(size) * queries + 1e-9))


def connected_groups(queries: Digests, of_query: Integers, passages: Digests) -> Integers:
    """[Q] group numbers, from 0: queries are in one group where pairs connect them, directly or through others.

    A text that is a query of one pair and a passage of another connects the two as well.

    Args:
        queries: [Q], distinct and sorted.
        of_query: [P], the place in `queries` of each pair's query.
        passages: [P], each pair's positive passage. No pair comes twice.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    texts = np.unique(np.concatenate([queries, passages]))
    place = np.searchsorted(texts, queries)
    edges = (place[of_query], np.searchsorted(texts, passages))
    graph = coo_matrix((np.ones(len(passages), np.int8), edges), shape=(len(texts), len(texts)))
    _, component = connected_components(graph, directed=False)
    return np.unique(component[place], return_inverse=True)[1].astype(np.int64)


def choose_splits(groups: Integers, queries: Digests, dev: int, test: int, seed: int) -> npt.NDArray[np.int8]:
    """[Q] TRAIN, DEV or TEST: groups are drawn at random until a set has its size, or as near as whole groups come.

    The draw depends on the queries' texts and the seed alone. The test set does not depend on `dev`. A group of more
    than a tenth of a set is drawn only where smaller ones do not fill it.

    Args:
        groups: [Q] group numbers, from 0.
        queries: [Q].
        dev: queries wanted.
        test: queries wanted.
    """
    sizes = np.bincount(groups)
    order = np.full(len(sizes), np.iinfo(np.uint64).max)
    np.minimum.at(order, groups, _random(queries, seed))
    splits = np.full(len(sizes), TRAIN, np.int8)
    for split, wanted in ((TEST, test), (DEV, dev)):
        left = np.flatnonzero(splits == TRAIN)
        splits[left[_draw(sizes[left], order[left], wanted)]] = split
    return splits[groups]


def reaches(count: int, wanted: int) -> bool:
    """Whether `count` queries may stand for the `wanted` ones: at least half. (They are never more than twice.)"""
    return wanted <= 2 * count


def _draw(sizes: Integers, order: Digests, wanted: int) -> list[int]:
    """Places of groups whose sizes add up to about `wanted`."""
    ranked = np.lexsort((order, sizes > max(1, wanted // 10)))
    drawn, left_over, missing = [], [], wanted
    for place, size in zip(ranked.tolist(), sizes[ranked].tolist(), strict=True):
        if not missing:
            break
        if size <= missing:
            drawn.append(place)
            missing -= size
        else:
            left_over.append(place)
    if missing and left_over:
        # Too many of the smallest group may be nearer than too few.
        smallest = min(left_over, key=lambda place: sizes[place])
        if sizes[smallest] - missing <= missing:
            drawn.append(smallest)
    return drawn


def _random(queries: Digests, seed: int) -> Digests:
    """A number for each query, different for different ones: its digest and the seed's, mixed by SplitMix64."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = queries ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
